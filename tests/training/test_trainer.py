import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2.api.exceptions import ControllerError

sys.path.append(str(Path(__file__).parent))

from worlds import run_one, small_task, with_knobs

from pipeline import cluster
from pipeline.config import to_flat
from pipeline.errors import UserError, WorldError
from pipeline.storage import UnreachableError
from pipeline.tracking import Tracker
from pipeline.training import trainer
from pipeline.training.identity import open_run
from pipeline.training.task import differences
from pipeline.training.trainer import new_name
from pipeline.training.worker import HopelessError


def test_a_run_is_not_continued_on_another_data_set(tmp_path: Path) -> None:
    task = with_knobs(small_task(tmp_path), name="run")
    open_run(task, Tracker(), None, {}).finish("FINISHED")
    other = replace(task, manifest=replace(task.manifest, class_names=("changed",)))
    assert other.manifest.digest != task.manifest.digest
    with pytest.raises(UserError, match=r"was trained on a data set with digest"):
        open_run(other, Tracker(), None, {})


def test_a_run_is_not_continued_with_knobs_that_make_it_another_and_may_run_longer(tmp_path: Path) -> None:
    task = with_knobs(small_task(tmp_path), name="run")
    open_run(task, Tracker(), None, {}).finish("FINISHED")
    with pytest.raises(UserError, match=r"schedule was linear, now cosine"):
        open_run(with_knobs(task, schedule="cosine"), Tracker(), None, {})
    again = open_run(with_knobs(task, steps=9, num_workers=2, log_every=1), Tracker(), None, {})
    assert again.name == "run"


def test_a_checkpoint_of_another_run_is_refused_whatever_mlflow_says(tmp_path: Path) -> None:
    task = small_task(tmp_path)
    run_one(task, tmp_path / "out")
    with pytest.raises(HopelessError, match=r"belongs to another run: lr was 0.002, now 0.1"):
        run_one(with_knobs(task, lr=0.1), tmp_path / "again", resume_from=tmp_path / "out" / "step-00000004")
    assert issubclass(HopelessError, WorldError)


def test_differences_name_what_was_and_what_is(tmp_path: Path) -> None:
    config = small_task(tmp_path).config
    params = {key: str(value) for key, value in to_flat(config).items() if key == "seed"}
    assert differences(config, params) == []
    assert differences(config, {"seed": "7", "steps": "1", "unknown": "x"}) == ["seed was 7, now 0"]


def test_new_names_differ_and_say_what_the_run_is(tmp_path: Path) -> None:
    config = small_task(tmp_path).config
    names = {new_name(config) for _ in range(5)}
    assert len(names) == 5
    assert all(name.startswith("digits-linear-T1000-") for name in names)


def test_gpus_that_a_joined_cluster_lacks_now_are_asked_for_so_that_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "fits", lambda **_: 0)
    with pytest.raises(UserError, match="--use-gpu"):
        cluster.require(num_workers=1, cpus_per_worker=1, use_gpu=True)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster.require(num_workers=1, cpus_per_worker=1, use_gpu=True)


def test_a_run_whose_checkpoints_are_gone_is_refused_and_keeps_its_status(tmp_path: Path) -> None:
    task = with_knobs(small_task(tmp_path), name="run")
    tracker = Tracker()
    run = open_run(task, tracker, None, {})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "meta.json").write_text("{}")
    run.publish(tmp_path / "model", 4, {})
    run.finish("FINISHED")
    with pytest.raises(UserError, match=r"MLflow has checkpoints of run 'run' up to step 4, but .* holds none"):
        open_run(task, tracker, None, {})
    assert tracker.client.get_run(run.run_id).info.status == "FINISHED"


def test_a_fixed_group_waits_for_machines_that_boot_and_an_elastic_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for elastic, seconds in ((False, "1800"), (True, "30")):
        for name in ("WORKER_GROUP_START", "WORKER_HEALTH_CHECK", "COLLECTIVE"):
            monkeypatch.delenv(f"RAY_TRAIN_{name}_TIMEOUT_S", raising=False)
        cluster.set_patience(hung_after_seconds=7, barrier_seconds=9, elastic=elastic)
        assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == seconds
        assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "7"
        assert os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] == "9"


class _Scripted:
    """A trainer whose ``fit`` does one thing after another."""

    def __init__(self, *outcomes: object) -> None:
        self.left = list(outcomes)

    def fit(self) -> object:
        outcome = self.left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


BUSY = OSError(
    "When completing multiple part upload: AWS Error NO_SUCH_UPLOAD during CompleteMultipartUpload operation"
)
DENIED = OSError(
    "When completing multiple part upload: AWS Error ACCESS_DENIED during CompleteMultipartUpload operation"
)


@pytest.fixture
def train_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[_Scripted], Any]:
    """Runs the loop around a scripted trainer, without pauses and without a cluster."""
    task = small_task(tmp_path)
    monkeypatch.setattr(trainer, "_OUTAGE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "_POLL_SECONDS", 0.01)
    recorder = SimpleNamespace(publish=lambda _: None, turn=lambda: None)

    def run(scripted: _Scripted) -> Any:
        monkeypatch.setattr(trainer, "_trainer", lambda *_: scripted)
        return trainer._train(task, "run", None, recorder)  # type: ignore[arg-type]

    return run


def test_a_run_outlives_a_store_that_is_too_busy_for_rays_controller(
    train_with: Callable[[_Scripted], Any], caplog: pytest.LogCaptureFixture
) -> None:
    done = SimpleNamespace(return_value=4)
    assert train_with(_Scripted(ControllerError(BUSY), ControllerError(BUSY), done)) is done
    assert caplog.text.count("training starts again from its last checkpoint: training failed: ") == 2


@pytest.mark.parametrize(
    ("errors", "kind", "words"),
    [
        ([ControllerError(BUSY)] * 4, UnreachableError, "NO_SUCH_UPLOAD"),
        ([ControllerError(DENIED)], WorldError, "ACCESS_DENIED"),
        ([ControllerError(OSError(28, "No space left on device"))], WorldError, "No space left"),
        ([ControllerError(ValueError("AWS Error"))], WorldError, "AWS Error"),
    ],
)
def test_what_does_not_pass_by_itself_ends_the_run(
    train_with: Callable[[_Scripted], Any], errors: list[Exception], kind: type[Exception], words: str
) -> None:
    scripted = _Scripted(*errors)
    with pytest.raises(kind, match=words):
        train_with(scripted)
    assert not scripted.left
