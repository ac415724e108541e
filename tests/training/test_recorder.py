import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow.exceptions import MlflowException

sys.path.append(str(Path(__file__).parent))

from measurements import Thread
from servers import mlflow_process
from worlds import run_one, small_task

from pipeline.model_folder import EMA_FILE, load_tensors, read_meta, write_meta, write_tensors
from pipeline.tracking import TIMESTAMP, MetricRecord, TakenOverError, TrackedRun, Tracker
from pipeline.training import recorder as recorder_module
from pipeline.training.mailbox import Committed, Mailbox
from pipeline.training.quality import Quality
from pipeline.training.recorder import Recorder
from pipeline.training.spool import Spool, spool_folder
from pipeline.training.task import TrainingTask


class LocalCheckpoint:
    """What Ray Train commits, without Ray: a folder in storage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, str(folder)

    def as_directory(self) -> Any:
        return _Directory(self.folder)


class _Directory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> str:
        return str(self.folder)

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def trained(tmp_path: Path) -> tuple[TrainingTask, Path]:
    """Checkpoints of steps 4 and 8."""
    task = small_task(tmp_path, grid_images=2)
    run_one(task, tmp_path / "out")
    return task, tmp_path / "out"


def make_recorder(task: TrainingTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mail: list[Any]) -> Recorder:
    run = Tracker().start_run("run", experiment="ddpm", params={}, tags={})
    mailbox = SimpleNamespace(take_all=SimpleNamespace(remote=lambda: [mail.pop(0) for _ in range(len(mail))]))
    monkeypatch.setattr(recorder_module.ray, "get", lambda items: items)
    quality = Quality(task, run, folder=str(tmp_path / "grids"), start=Thread)
    return Recorder(run, task.config, mailbox, tags={}, quality=quality)


def record(step: int) -> dict[str, float]:
    return {"step": step, "train/loss": 1.0 / step, "perf/images_per_second": 1.0, "perf/step_seconds": 1.0} | {
        "perf/data_wait_ratio": 0.0
    }


def committed(out: Path, step: int) -> Committed:
    return Committed(step, LocalCheckpoint(out / f"step-{step:08d}"))  # type: ignore[arg-type]


def steps_of(recorder: Recorder) -> list[int]:
    client, run = Tracker().client, recorder._run
    return [metric.step for metric in client.get_metric_history(run.run_id, "train/loss")]


def test_each_step_and_each_checkpoint_is_sent_once_though_workers_repeat_them(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = trained
    mail: list[Any] = [record(2), record(4), committed(out, 4), record(4), record(6), committed(out, 4)]
    recorder = make_recorder(task, tmp_path, monkeypatch, mail)
    recorder.turn()
    mail += [record(6), record(8), committed(out, 8)]
    recorder.finish()
    assert steps_of(recorder) == [2, 4, 6, 8]
    assert recorder._published == {4, 8}
    assert recorder._run.published_steps() == {4, 8}
    assert (tmp_path / "grids" / "step-00000008.png").exists()
    # A later driver of the same run starts where this one stopped.
    later = make_recorder(task, tmp_path, monkeypatch, [record(8), committed(out, 8), record(10)])
    later.finish()
    assert steps_of(later) == [2, 4, 6, 8, 10]
    assert len(Tracker().checkpoints(later._run.experiment_id)) == 2


def test_an_mlflow_that_is_away_for_a_while_costs_nothing_and_doubles_nothing(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = trained
    recorder = make_recorder(task, tmp_path, monkeypatch, [record(2), record(4), committed(out, 4)])
    applied_then_lost = iter([True, False, False])
    send, publish = TrackedRun.log_metrics, TrackedRun.publish
    lose_answer = iter([True, False])

    def flaky_send(self: TrackedRun, records: Sequence[MetricRecord]) -> None:
        send(self, records)
        if next(applied_then_lost, False):
            raise MlflowException("the answer was lost")

    def flaky_publish(self: TrackedRun, *arguments: Any) -> str:
        model_id = publish(self, *arguments)
        if next(lose_answer, False):
            raise MlflowException("the answer was lost")
        return model_id

    monkeypatch.setattr(TrackedRun, "log_metrics", flaky_send)
    monkeypatch.setattr(TrackedRun, "publish", flaky_publish)
    monkeypatch.setattr(recorder_module, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(recorder_module, "_POLL_SECONDS", 0.01)
    recorder.turn()
    recorder.finish()
    assert steps_of(recorder) == [2, 4]
    assert len(Tracker().checkpoints(recorder._run.experiment_id)) == 1


def test_a_checkpoint_that_storage_has_dropped_does_not_hold_up_the_next(
    trained: tuple[TrainingTask, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, out = trained
    shutil.rmtree(out / "step-00000004")
    recorder = make_recorder(task, tmp_path, monkeypatch, [committed(out, 4), committed(out, 8)])
    recorder.finish()
    assert recorder._run.published_steps() == {8}
    assert "step 4 cannot be published" in caplog.text


def test_a_checkpoint_is_kept_for_publication_though_storage_drops_it_meanwhile(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = trained
    recorder = make_recorder(task, tmp_path, monkeypatch, [committed(out, 4)])
    with monkeypatch.context() as away:
        away.setattr(TrackedRun, "heartbeat", lambda self: (_ for _ in ()).throw(MlflowException("away")))
        recorder.turn()
        recorder._copier.submit(lambda: None).result()
        shutil.rmtree(out / "step-00000004")
    recorder._next_try = 0.0
    recorder.finish()
    assert recorder._run.published_steps() == {4}


def test_a_copy_waits_for_a_store_that_is_too_slow_for_pyarrow(
    trained: tuple[TrainingTask, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, out = trained
    slow, copies = OSError("When listing objects: AWS Error NETWORK_CONNECTION: curlCode: 28, Timeout was reached"), []
    copy = recorder_module._copy_at_once

    def copy_at_once(item: Committed, folder: Path) -> Path:
        copies.append(folder)
        if len(copies) == 1:
            raise slow
        return copy(item, folder)

    monkeypatch.setattr(recorder_module, "_copy_at_once", copy_at_once)
    recorder = make_recorder(task, tmp_path, monkeypatch, [committed(out, 4)])
    recorder.finish()
    assert recorder._run.published_steps() == {4}
    assert len(copies) == 2
    assert "storage is unreachable since " in caplog.text


def test_a_checkpoint_that_storage_could_not_give_for_a_moment_is_published_when_it_is_offered_again(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = trained
    hidden = (out / "step-00000004").rename(tmp_path / "away")
    recorder = make_recorder(task, tmp_path, monkeypatch, [committed(out, 4)])
    deadline = time.monotonic() + 30
    recorder.turn()
    while recorder._unpublished:
        assert time.monotonic() < deadline
        recorder.turn()
    assert recorder._run.published_steps() == set()
    hidden.rename(out / "step-00000004")
    recorder.publish(committed(out, 4))  # as the driver does with what is kept at the end
    recorder.finish()
    assert recorder._run.published_steps() == {4}


def test_a_checkpoint_whose_network_is_broken_is_published_without_a_sheet_and_mlflow_is_not_blamed(
    trained: tuple[TrainingTask, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, out = trained
    weights = load_tensors(out / "step-00000008", EMA_FILE, meta := read_meta(out / "step-00000008"))
    key = next(iter(weights))
    write_tensors(out / "step-00000008", EMA_FILE, weights | {key: torch.full_like(weights[key], torch.nan)})
    write_meta(out / "step-00000008", step=8, config=meta.config, data=meta.data, code=meta.code)
    recorder = make_recorder(task, tmp_path, monkeypatch, [committed(out, 4), committed(out, 8)])
    recorder.finish()
    assert recorder._run.published_steps() == {4, 8}
    assert "the checkpoint of step 8 could not be measured: the network returned values that are not" in caplog.text
    assert "MLflow does not take" not in caplog.text


def test_what_a_dead_driver_left_in_its_spool_is_sent_first_and_once(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = trained
    dead = make_recorder(task, tmp_path, monkeypatch, [])
    folder = spool_folder(dead._run)
    spool = Spool(folder)
    for step in (2, 4, 6):
        spool.append({**record(step), TIMESTAMP: 1e12 + step})
    spool.append({**record(4), TIMESTAMP: 1e12 + 99})  # done again after a worker failed
    spool._file.write(b'{"step": 8, "train/lo')  # it died while it wrote
    dead._run.log_metrics([{**record(2), TIMESTAMP: 1e12 + 2}])  # and after it had sent, before it could know
    dead.publish(committed(out, 4))
    dead._copier.submit(lambda: None).result()
    shutil.rmtree(out / "step-00000004")
    late = make_recorder(task, tmp_path, monkeypatch, [record(6), record(8)])
    late.turn()
    assert steps_of(late) == [2, 6, 8]  # the spool is held by a living process: it is not touched
    spool._file.close()
    late.finish()
    assert sorted(steps_of(late)) == [2, 4, 6, 8]
    assert late._run.published_steps() == {4}
    assert not folder.parent.exists()


def test_records_that_mlflow_did_not_take_before_an_interrupt_are_sent_by_the_next_driver(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = trained
    run = Tracker().start_run("run", experiment="ddpm", params={}, tags={})
    mailbox = Mailbox(spool_folder(run))
    mailbox.put(record(2))
    mailbox.put(record(4))
    assert [item["step"] for item in mailbox.take_all()] == [2, 4]  # type: ignore[index]
    restarted = Mailbox(spool_folder(run))  # as Ray does when the actor's process dies
    assert [item["step"] for item in restarted.take_all()] == [2, 4]  # type: ignore[index]
    mailbox._spool._file.close()
    restarted._spool._file.close()
    later = make_recorder(task, tmp_path, monkeypatch, [])
    later.finish()
    assert steps_of(later) == [2, 4]


def test_a_driver_that_was_replaced_ends_at_its_next_turn(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = trained
    replaced = make_recorder(task, tmp_path, monkeypatch, [record(2)])
    later = make_recorder(task, tmp_path, monkeypatch, [record(2)])
    later.turn()
    with pytest.raises(TakenOverError, match="another driver has taken over run run"):
        replaced.turn()
    with pytest.raises(TakenOverError):
        replaced.finish()
    replaced.save_what_there_is()
    assert steps_of(later) == [2]


@pytest.mark.slow
def test_a_server_that_is_away_in_the_middle_of_a_run_costs_and_doubles_nothing(
    trained: tuple[TrainingTask, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task, out = trained
    (tmp_path / "server").mkdir()
    with mlflow_process(tmp_path / "server") as (uri, server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setattr(recorder_module, "_RETRY_SECONDS", 1.0)
        monkeypatch.setattr(recorder_module, "_BATCH_SECONDS", 0.0)
        mail: list[Any] = [record(2), committed(out, 4)]
        recorder = make_recorder(task, tmp_path, monkeypatch, mail)
        recorder.turn()
        server.kill()
        mail += [record(4), record(6), committed(out, 8)]
        recorder.turn()
        assert "MLflow does not take records at the moment; kept and sent later" in caplog.text
        server.start(wait=False)
        mail += [record(6), record(8)]
        recorder.finish()
        recorder._run.finish("FINISHED")
        assert steps_of(recorder) == [2, 4, 6, 8]
        assert sorted(entry.step for entry in Tracker().checkpoints(recorder._run.experiment_id)) == [4, 8]
        assert Tracker().client.get_run(recorder._run.run_id).info.status == "FINISHED"


def test_records_of_two_seconds_are_one_request_and_the_end_waits_for_none(
    trained: tuple[TrainingTask, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = trained
    mail: list[Any] = [record(2)]
    recorder = make_recorder(task, tmp_path, monkeypatch, mail)
    sent: list[list[int]] = []
    log = recorder._run.log_metrics

    def count(records: list[dict[str, Any]]) -> None:
        sent.append([each["step"] for each in records])
        log(records)

    monkeypatch.setattr(recorder._run, "log_metrics", count)
    recorder.turn()
    for step in (4, 6):
        mail += [record(step)]
        recorder.turn()
    assert sent == [[2]]
    monkeypatch.setattr(recorder, "_next_batch", 0.0)  # two seconds later
    recorder.turn()
    mail += [record(8)]
    recorder.finish()
    assert sent == [[2], [4, 6], [8]]
    assert steps_of(recorder) == [2, 4, 6, 8]
