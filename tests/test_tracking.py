"""Runs, published checkpoints and results in a real MLflow store."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from servers import mlflow_server

from pipeline import storage
from pipeline.errors import UserError, WorldError
from pipeline.tracking import TIMESTAMP, Checkpoint, DataSetInput, TakenOverError, TrackedRun, Tracker, ownership, store
from pipeline.tracking.ownership import ABANDONED_SECONDS, Claim, latest_claim


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder to publish."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "ema.safetensors").write_bytes(os.urandom(100_000))
    (folder / "meta.json").write_text('{"step": 1}\n')
    return folder


def start(tracker: Tracker, name: str = "run-a", experiment: str = "ddpm", **arguments: object) -> TrackedRun:
    return tracker.start_run(name, experiment=experiment, **{"params": {}, "tags": {}} | arguments)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(checkpoints: list[Checkpoint]) -> Checkpoint:
    assert len(checkpoints) == 1
    return checkpoints[0]


def tags_of(tracker: Tracker, run: TrackedRun) -> dict[str, str]:
    return dict(tracker.client.get_run(run.run_id).data.tags)


def status_of(tracker: Tracker, run: TrackedRun) -> str:
    return tracker.client.get_run(run.run_id).info.status


def history(tracker: Tracker, run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracker.client.get_metric_history(run.run_id, key)]


@contextmanager
def living_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def owned_by(tracker: Tracker, run: TrackedRun, **claim: object) -> Claim:
    """Lets another driver own a run, with a heartbeat of the same time."""
    latest = latest_claim(tracker.client.get_run(run.run_id))
    other = Claim(number=latest.number + 1, **claim)
    tracker.client.log_param(run.run_id, other.key, other.to_json())
    tracker.client.set_tag(run.run_id, "ddpm.heartbeat", str(int(other.time)))
    tracker.client.update_run(run.run_id, status="RUNNING")
    return other


def elsewhere(silent: float = 0.0) -> dict[str, object]:
    """A driver on another machine that was heard of some seconds ago."""
    return {"host": "another-host", "machine": "another", "pid": 1, "time": time.time() - silent}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds instead of minutes."""
    monkeypatch.setattr(ownership, "STALE_SECONDS", 3.0)
    monkeypatch.setattr(ownership, "CLOCK_SECONDS", 2.0)
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.5)


# The store.


def test_the_default_store_lies_under_home_and_is_created(tmp_path):
    tracker = Tracker()
    assert tracker.uri == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert (tmp_path / "home" / "mlflow.db").is_file()


def test_artifacts_of_the_default_store_lie_under_home(tracker, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = start(tracker)
    run.publish(model, 1, {})
    where = only(tracker.checkpoints(run.experiment_id)).artifact_uri
    assert where.startswith(Path(storage.home(), "mlartifacts", "ddpm").as_uri() + "/")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "model"}


def test_a_remote_home_needs_a_tracking_uri(monkeypatch):
    monkeypatch.setenv("DDPM_HOME", "s3://bucket/ddpm")
    with pytest.raises(UserError, match=r"^DDPM_HOME=s3://bucket/ddpm is remote: set MLFLOW_TRACKING_URI"):
        Tracker()


def test_a_home_that_cannot_be_made_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(WorldError, match=rf"^cannot create DDPM_HOME={tmp_path}/file/home: Not a directory$"):
        Tracker()


def test_a_server_that_nobody_started_is_one_clear_line_and_soon(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(WorldError, match=r"^MLflow at http://127.0.0.1:9 does not answer \(ConnectionError\); .*$"):
        Tracker()
    assert time.monotonic() - begin < 3


@pytest.mark.slow
def test_a_server_that_accepts_and_stays_silent_is_given_up_soon(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(store, "_HEALTH_SECONDS", 2.0)
        begin = time.monotonic()
        with pytest.raises(WorldError, match=r"does not answer \(ReadTimeout\)"):
            Tracker()
        assert time.monotonic() - begin < 8


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("file:///var/mlruns", "file:///var/mlruns"),
        ("nonsense://host", "nonsense://host"),
        ("postgresql+nodriver://ml:secret@127.0.0.1:9/db", r"postgresql\+nodriver://ml:\*\*\*@127.0.0.1:9/db"),
    ],
)
def test_a_store_that_mlflow_cannot_open_is_one_clear_line_without_the_password(monkeypatch, uri, shown):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(WorldError, match=rf"^MLflow at {shown} refused: [^\n]+$") as error:
        Tracker()
    assert "secret" not in str(error.value)


def test_a_damaged_store_is_one_clear_line():
    Path(storage.home()).mkdir()
    Path(storage.home(), "mlflow.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(WorldError, match=r"^MLflow at sqlite:///.*/mlflow.db refused: .*file is not a database$"):
        Tracker()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://ml:secret@127.0.0.1:9/x", "http://ml:***@127.0.0.1:9/x"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
    ],
)
def test_a_password_is_never_shown(monkeypatch, uri, shown):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(WorldError) as error:
        Tracker()
    assert f"MLflow at {shown} does not answer" in str(error.value)
    assert "secret" not in str(error.value)


# Experiments.


def test_an_unknown_experiment_is_refused_with_the_known_ones(tracker):
    start(tracker)
    with pytest.raises(UserError, match=r"^no experiment 'dpdm' in sqlite:///.*; known: Default, ddpm$"):
        tracker.experiment("dpdm", create=False)


def test_a_deleted_experiment_is_refused_and_says_so(tracker):
    tracker.client.delete_experiment(tracker.experiment("ddpm", create=True))
    with pytest.raises(UserError, match="experiment 'ddpm' was deleted"):
        tracker.experiment("ddpm", create=True)


def test_an_experiment_is_created_once(tracker):
    assert tracker.experiment("ddpm", create=True) == tracker.experiment("ddpm", create=True)


# One run for each name.


def test_the_same_name_again_continues_the_same_run(tracker):
    first = start(tracker)
    first.finish("FAILED")
    second = start(tracker)
    assert second.run_id == first.run_id
    assert tracker.run_names() == ["run-a"]
    assert status_of(tracker, second) == "RUNNING"


def test_another_name_is_another_run(tracker):
    assert start(tracker, "run-a").run_id != start(tracker, "run-b").run_id


def test_params_are_those_of_the_first_start(tracker):
    first = start(tracker, params={"lr": 0.1, "channel_mult": [1, 2], "name": "x", "use_gpu": False})
    assert first.params == {"lr": "0.1", "channel_mult": "[1, 2]", "name": "x", "use_gpu": "false"}
    second = start(tracker, params={"lr": 0.2})
    assert second.params == first.params == tracker.params(first.run_id)


def test_a_param_longer_than_mlflow_allows_is_cut(tracker):
    assert len(start(tracker, params={"long": "x" * 10_000}).params["long"]) == 6000


def test_tags_are_set_at_every_start(tracker):
    start(tracker, tags={"git_commit": "a"})
    run = start(tracker, tags={"git_commit": "b"})
    assert tags_of(tracker, run)["git_commit"] == "b"


def test_a_child_run_knows_its_parent(tracker):
    parent = start(tracker, "sweep")
    child = start(tracker, "trial", parent_run_id=parent.run_id)
    assert tags_of(tracker, child)["mlflow.parentRunId"] == parent.run_id


def test_children_that_a_sweep_left_running_are_marked_killed(tracker):
    parent = start(tracker, "sweep")
    done, stopped = (start(tracker, name, parent_run_id=parent.run_id) for name in ("done", "stopped"))
    stranger = start(tracker, "stranger")
    done.finish("FINISHED")
    tracker.end_children(parent.run_id, parent.experiment_id)
    statuses = [status_of(tracker, run) for run in (parent, done, stopped, stranger)]
    assert statuses == ["RUNNING", "FINISHED", "KILLED", "RUNNING"]


def test_the_names_of_the_newest_runs_come_first(tracker):
    for name in ("a", "b", "c"):
        start(tracker, name)
        time.sleep(0.002)  # runs are ordered by their start, in milliseconds
    assert tracker.run_names(limit=2) == ["c", "b"]


def test_the_data_set_is_recorded_with_the_run(tracker):
    data_set = DataSetInput(name="digits", location="s3://b/digits", digest="d" * 64, profile={"num_images": 9})
    run = start(tracker, data_set=data_set)
    recorded = tracker.client.get_run(run.run_id).inputs.dataset_inputs[0].dataset
    assert (recorded.name, recorded.digest, recorded.source_type) == ("digits", "d" * 36, "s3")
    assert recorded.source == '{"uri": "s3://b/digits"}'
    assert recorded.profile == '{"num_images": 9}'


def test_a_name_that_another_experiment_uses_is_refused(tracker):
    start(tracker, experiment="one")
    with pytest.raises(UserError, match=r"^--name 'run-a' is a run of experiment 'one'; choose another name$"):
        start(tracker, experiment="two")


def test_a_run_is_found_by_its_name_in_any_experiment(tracker):
    run = start(tracker, experiment="one")
    assert tracker.find_run("run-a").info.run_id == run.run_id
    assert tracker.find_run("run") is None


@pytest.mark.parametrize("name", ["it's", 'say "x"', "a' or '1' = '1", "50%", ""])
def test_a_name_with_odd_characters_finds_nothing(tracker, name):
    start(tracker)
    assert tracker.find_run(name) is None


# One writer.


def test_a_run_that_a_living_process_writes_is_refused(tracker):
    run = start(tracker)
    with living_process() as other:
        owned_by(tracker, run, pid=other.pid)
        message = rf"^run 'run-a' is being written by a live driver \({socket.gethostname()}:{other.pid}, last seen 0 s"
        with pytest.raises(UserError, match=message):
            start(tracker)


def test_a_run_whose_process_is_dead_is_taken_over_at_once(tracker):
    run = start(tracker)
    with living_process() as other:
        owned_by(tracker, run, pid=other.pid)
    assert start(tracker).run_id == run.run_id
    assert tags_of(tracker, run)["ddpm.owner"] == f"{socket.gethostname()}:{os.getpid()}"
    assert status_of(tracker, run) == "RUNNING"


def test_a_process_that_began_later_than_the_claim_is_another_one_with_the_same_number(tracker):
    run = start(tracker)
    with living_process() as other:
        owned_by(tracker, run, pid=other.pid, time=time.time() - 3600)
        assert start(tracker).run_id == run.run_id


def test_a_driver_that_was_silent_on_this_machine_is_replaced_though_its_process_is_there(tracker, quick):
    run = start(tracker)
    with living_process() as other:
        owned_by(tracker, run, pid=other.pid, time=time.time() - 4)
        assert start(tracker).run_id == run.run_id


def test_a_run_of_another_machine_is_refused_once_its_heart_beats_whatever_its_clock_says(tracker, quick):
    run = start(tracker)
    owned_by(tracker, run, **elsewhere(silent=100))
    beat = threading.Timer(0.7, tracker.client.set_tag, (run.run_id, "ddpm.heartbeat", str(int(time.time() - 99))))
    beat.start()
    with pytest.raises(UserError, match=r"live driver \(another-host:1"):
        start(tracker)
    beat.join()


@pytest.mark.parametrize("silent", [-1000.0, 0.0, 4.0])
def test_a_run_of_another_machine_is_taken_over_after_a_wait_without_a_heartbeat(tracker, quick, silent):
    run = start(tracker)
    owned_by(tracker, run, **elsewhere(silent))
    started = time.monotonic()
    assert start(tracker).run_id == run.run_id
    assert time.monotonic() - started > 0.9


def test_a_run_of_another_machine_is_taken_over_at_once_when_it_has_been_silent_for_very_long(tracker):
    run = start(tracker)
    owned_by(tracker, run, **elsewhere(ABANDONED_SECONDS + 1))
    assert start(tracker).run_id == run.run_id


def test_a_finished_run_belongs_to_nobody(tracker):
    run = start(tracker)
    with living_process() as other:
        claim = owned_by(tracker, run, pid=other.pid)
        TrackedRun(tracker.client, tracker.client.get_run(run.run_id), claim).finish("FINISHED")
        assert start(tracker).run_id == run.run_id


def test_a_driver_that_was_replaced_writes_no_more(tracker, model):
    stopped = start(tracker)
    owned_by(tracker, stopped, **elsewhere())
    writes = [
        lambda: stopped.log_metrics([{"step": 1, "loss": 0.5}]),
        lambda: stopped.log_grid(np.zeros((8, 8, 3), dtype=np.uint8), step=1),
        lambda: stopped.log_text("", "report.md"),
        lambda: stopped.set_tags({"a": "b"}),
        lambda: stopped.publish(model, 1, {}),
        lambda: stopped.finish("FAILED"),
    ]
    for write in writes:
        with pytest.raises(TakenOverError, match=r"^another driver has taken over run run-a \(another-host:1\)"):
            write()
    assert history(tracker, stopped, "loss") == []
    assert status_of(tracker, stopped) == "RUNNING"
    assert tracker.checkpoints(stopped.experiment_id) == []


def test_two_claims_of_one_number_are_told_apart_by_mlflow(tracker):
    run = tracker.client.get_run(start(tracker).run_id)
    claims = [Claim(number=7, **elsewhere()) for _ in range(8)]
    won = []

    def contend(claim: Claim) -> None:
        if ownership.try_claim(tracker.client, run.info.run_id, claim):
            won.append(claim)

    threads = [threading.Thread(target=contend, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [latest_claim(tracker.client.get_run(run.info.run_id))]
    assert ownership.try_claim(tracker.client, run.info.run_id, won[0])  # an answer that was lost


def test_claims_are_no_params_of_the_config(tracker):
    run = start(tracker, params={"lr": 0.1})
    run.finish("FINISHED")
    assert start(tracker).params == tracker.params(run.run_id) == {"lr": "0.1"}


# Runs whose driver is gone.


def test_a_run_whose_driver_died_is_marked_killed_by_the_next_job_of_the_experiment(tracker):
    dead, silent, parent = (start(tracker, name) for name in ("dead", "silent", "sweep"))
    child = start(tracker, "trial", parent_run_id=parent.run_id)
    with living_process() as other:
        for run in (dead, parent, child):
            owned_by(tracker, run, pid=other.pid)
    owned_by(tracker, silent, **elsewhere(ABANDONED_SECONDS + 5))
    start(tracker, "next")
    assert [status_of(tracker, run) for run in (dead, silent, parent, child)] == ["KILLED"] * 4
    assert tags_of(tracker, dead)["ddpm.ended"] == f"its driver {socket.gethostname()}:{other.pid} is gone"
    assert tags_of(tracker, silent)["ddpm.ended"].startswith("its driver another-host:1 was silent for 60")


def test_runs_that_live_or_are_not_ours_are_left_alone(tracker):
    alive, remote, strange = start(tracker, "alive"), start(tracker, "remote"), start(tracker, "strange")
    foreign = tracker.client.create_run(alive.experiment_id, run_name="foreign")
    owned_by(tracker, remote, **elsewhere(ABANDONED_SECONDS - 60))
    owned_by(tracker, strange, **elsewhere(-3600))
    with living_process() as other:
        owned_by(tracker, alive, pid=other.pid, time=time.time() - 30)
        tracker.close_abandoned("ddpm")
    statuses = {run.info.run_name: run.info.status for run in tracker.client.search_runs([alive.experiment_id])}
    assert statuses == dict.fromkeys(["alive", "remote", "strange", "foreign"], "RUNNING")
    assert foreign.info.status == "RUNNING"


def test_a_run_that_was_marked_killed_is_continued_by_its_name(tracker):
    run = start(tracker)
    with living_process() as other:
        owned_by(tracker, run, pid=other.pid)
    tracker.close_abandoned("ddpm")
    assert status_of(tracker, run) == "KILLED"
    assert start(tracker).run_id == run.run_id
    assert status_of(tracker, run) == "RUNNING"


def test_a_driver_that_was_taken_for_dead_takes_its_run_back(tracker):
    run = start(tracker)
    ownership.close(tracker.client, tracker.client.get_run(run.run_id), "its driver was silent for 700 s")
    assert status_of(tracker, run) == "KILLED"
    run.log_metrics([{"step": 1, "loss": 0.5}])
    assert status_of(tracker, run) == "RUNNING"
    assert history(tracker, run, "loss") == [(1, 0.5)]


def test_a_trial_whose_sweep_has_ended_ends_as_well(tracker):
    parent = start(tracker, "sweep")
    child = start(tracker, "trial", parent_run_id=parent.run_id)
    tracker.end_children(parent.run_id, parent.experiment_id)
    with pytest.raises(TakenOverError, match=r"^run trial was ended from outside: its sweep ended$"):
        child.log_metrics([{"step": 1, "loss": 0.5}])
    assert status_of(tracker, child) == "KILLED"


def test_a_driver_that_died_while_it_ended_its_run_is_believed(tracker, monkeypatch):
    run = start(tracker)
    monkeypatch.setattr(tracker.client, "set_terminated", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.finish("FAILED")
    monkeypatch.undo()
    tracker.close_abandoned("ddpm")
    assert status_of(tracker, run) == "FAILED"


def test_a_run_that_a_driver_takes_at_the_same_moment_is_not_marked(tracker):
    run = start(tracker)
    with living_process() as other:
        owned_by(tracker, run, pid=other.pid)
    seen = tracker.client.get_run(run.run_id)
    start(tracker)
    assert ownership.close_abandoned(tracker.client, [seen]) == []
    assert status_of(tracker, run) == "RUNNING"


def test_an_mlflow_that_refuses_does_not_hinder_the_next_job(tracker, monkeypatch):
    start(tracker)
    monkeypatch.setattr(tracker.client, "search_runs", lambda *_: (_ for _ in ()).throw(RuntimeError("away")))
    tracker.close_abandoned("ddpm")


def test_a_start_that_fails_half_way_leaves_no_running_run(tracker, monkeypatch):
    monkeypatch.setattr(tracker, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(tracker)
    assert tracker.find_run("run-a").info.status == "FAILED"


def test_a_run_that_this_code_never_owned_is_continued(tracker):
    experiment_id = tracker.experiment("ddpm", create=True)
    made_by_hand = tracker.client.create_run(experiment_id, run_name="run-a")
    assert start(tracker).run_id == made_by_hand.info.run_id


def test_the_heart_beats_at_start_and_not_at_every_call(tracker):
    run = start(tracker)
    assert abs(time.time() - float(tags_of(tracker, run)["ddpm.heartbeat"])) < 10
    tracker.client.set_tag(run.run_id, "ddpm.heartbeat", "0")
    run.heartbeat()
    assert tags_of(tracker, run)["ddpm.heartbeat"] == "0"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_the_status_it_was_given(tracker, status):
    run = start(tracker)
    run.finish(status)
    assert status_of(tracker, run) == status


# What a run logs.


def test_metrics_are_logged_at_their_steps(tracker):
    run = start(tracker)
    run.log_metrics([{"step": 25, "train/loss": 0.5, "lr": 0.1}, {"step": 50, "train/loss": 0.25}])
    assert history(tracker, run, "train/loss") == [(25, 0.5), (50, 0.25)]
    assert history(tracker, run, "lr") == [(25, 0.1)]
    assert history(tracker, run, "step") == []


def test_more_metrics_than_a_request_takes_are_all_logged(tracker):
    run = start(tracker)
    run.log_metrics([{"step": step, "a": float(step), "b": 0.0} for step in range(1001)])
    assert history(tracker, run, "a") == [(step, float(step)) for step in range(1001)]


def test_no_metrics_are_no_request(tracker):
    start(tracker).log_metrics([])


def test_the_steps_that_are_logged_are_known(tracker):
    run = start(tracker)
    assert run.logged_steps("loss") == set()
    run.log_metrics([{"step": 50, "loss": 1.0}, {"step": 25, "loss": 1.0}])
    assert run.logged_steps("loss") == {25, 50}


def test_a_record_that_is_sent_again_with_its_time_is_the_same_record(tracker):
    run = start(tracker)
    records = [{"step": step, "a": 0.1 * step, "b": float("nan"), TIMESTAMP: 1e12 + step} for step in range(1200)]
    run.log_metrics(records[:700])
    run.log_metrics(records)
    run.log_metrics(records[100:])
    assert history(tracker, run, "a") == [(step, 0.1 * step) for step in range(1200)]
    assert [step for step, _ in history(tracker, run, "b")] == list(range(1200))


def test_a_record_is_logged_whole_or_not_at_all(tracker, monkeypatch):
    run, sent = start(tracker), []
    monkeypatch.setattr(tracker.client, "log_batch", lambda _, metrics: sent.append(metrics))
    run.log_metrics([{"step": step, **{f"m{key}": 0.0 for key in range(7)}} for step in range(300)])
    assert [len(batch) for batch in sent] == [896, 896, 308]
    assert all(len(batch) % 7 == 0 for batch in sent)


def test_a_grid_and_a_text_become_artifacts(tracker):
    run = start(tracker)
    run.log_grid(np.zeros((8, 8, 3), dtype=np.uint8), step=250)
    run.log_text("# report", "report.md")
    names = {entry.path for folder in ("", "images") for entry in tracker.client.list_artifacts(run.run_id, folder)}
    assert "report.md" in names
    assert [name for name in names if name.startswith("images/samples") and "250" in name and name.endswith(".png")]


# Published checkpoints.


def test_a_published_checkpoint_comes_back_byte_for_byte(tracker, model, tmp_path):
    run = start(tracker)
    model_id = run.publish(model, 250, {"data_digest": "abc"})
    checkpoint = only(tracker.checkpoints(run.experiment_id))
    assert (checkpoint.model_id, checkpoint.run_id, checkpoint.run_name) == (model_id, run.run_id, "run-a")
    assert checkpoint.step == 250
    assert files_of(tracker.download(checkpoint, tmp_path / "copy")) == files_of(model)


def test_a_published_checkpoint_carries_its_tags_and_awaits_evaluation(tracker, model):
    run = start(tracker)
    run.publish(model, 250, {"data_digest": "abc"})
    tags = only(tracker.checkpoints(run.experiment_id)).tags
    assert (tags["data_digest"], tags["step"], tags["eval_status"]) == ("abc", "250", "pending")


def test_a_run_name_with_dots_is_kept(tracker, model):
    run = start(tracker, "run-1.5_b-step-3")
    run.publish(model, 1, {})
    assert only(tracker.checkpoints(run.experiment_id)).run_name == "run-1.5_b-step-3"


def test_an_upload_that_was_cut_off_is_not_listed(tracker, model, monkeypatch):
    run = start(tracker)

    def cut_off(model_id: str, local_dir: str) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_model_artifacts", cut_off)
        with pytest.raises(ConnectionError):
            run.publish(model, 250, {})
    assert tracker.checkpoints(run.experiment_id) == []
    assert run.published_steps() == set()
    run.publish(model, 250, {})
    assert run.published_steps() == {250}


def test_models_that_are_no_checkpoints_of_ours_are_not_listed(tracker):
    run = start(tracker)
    foreign = tracker.client.create_logged_model(run.experiment_id, name="other", source_run_id=run.run_id)
    tracker.client.finalize_logged_model(foreign.model_id, "READY")
    assert tracker.checkpoints(run.experiment_id) == []


def test_checkpoints_are_listed_newest_first_and_by_run(tracker, model):
    a, b = start(tracker, "run-a"), start(tracker, "run-b")
    for run, step in [(a, 1), (b, 5), (a, 2)]:
        run.publish(model, step, {})
    listed = tracker.checkpoints(a.experiment_id)
    assert [(entry.run_name, entry.step) for entry in listed] == [("run-a", 2), ("run-b", 5), ("run-a", 1)]
    assert [entry.step for entry in tracker.checkpoints(a.experiment_id, run_id=a.run_id)] == [2, 1]
    assert (a.published_steps(), b.published_steps()) == ({1, 2}, {5})


def test_more_checkpoints_than_a_page_holds_are_all_listed(tracker, model, monkeypatch):
    run = start(tracker)
    monkeypatch.setattr(tracker.client, "log_model_artifacts", lambda model_id, local_dir: None)
    for step in range(105):
        run.publish(model, step, {})
    assert run.published_steps() == set(range(105))


def test_a_checkpoint_whose_files_are_gone_is_one_clear_line(tracker, model, tmp_path):
    run = start(tracker)
    run.publish(model, 250, {})
    shutil.rmtree(Path(storage.home(), "mlartifacts"))
    checkpoint = only(tracker.checkpoints(run.experiment_id))
    with pytest.raises(WorldError, match=r"^cannot read checkpoint run-a step 250 at file:///[^\n]*: [^\n]+$"):
        tracker.download(checkpoint, tmp_path / "copy")


@pytest.mark.parametrize(("error", "reason"), [(ConnectionError(), "ConnectionError"), (OSError("a\nb"), "a")])
def test_whatever_the_artifact_store_raises_is_one_clear_line(tracker, model, tmp_path, monkeypatch, error, reason):
    run = start(tracker)
    run.publish(model, 250, {})

    def fail(**_arguments: object) -> None:
        raise error

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail)
    with pytest.raises(WorldError) as caught:
        tracker.download(only(tracker.checkpoints(run.experiment_id)), tmp_path / "copy")
    assert str(caught.value).endswith(f": {reason}")


def test_a_result_is_stored_with_its_protocol_and_marks_the_checkpoint(tracker, model):
    run = start(tracker)
    run.publish(model, 250, {})
    before = only(tracker.checkpoints(run.experiment_id))
    assert not before.has_result("abc123")
    tracker.log_result(before, identity="abc123", protocol={"num_images": 10}, metrics={"fid": 3.17})
    after = only(tracker.checkpoints(run.experiment_id))
    assert after.has_result("abc123")
    assert not after.has_result("another")
    assert after.result("abc123") == {"protocol": {"num_images": 10}, "metrics": {"fid": 3.17}}
    assert after.tags["eval_status"] == "done"


def test_a_result_is_a_metric_of_the_run_and_of_the_checkpoint(tracker, model):
    run = start(tracker)
    run.publish(model, 250, {})
    checkpoint = only(tracker.checkpoints(run.experiment_id))
    tracker.log_result(checkpoint, identity="x", protocol={}, metrics={"fid": 3.17})
    assert history(tracker, run, "fid") == [(250, 3.17)]
    logged = tracker.client.get_logged_model(checkpoint.model_id).metrics
    assert [(metric.key, metric.value, metric.step) for metric in logged] == [("fid", 3.17, 250)]


def test_a_result_does_not_wake_a_finished_run(tracker, model):
    run = start(tracker)
    run.publish(model, 250, {})
    run.finish("FINISHED")
    tracker.log_result(only(tracker.checkpoints(run.experiment_id)), identity="x", protocol={}, metrics={"fid": 1.0})
    assert status_of(tracker, run) == "FINISHED"


def test_an_evaluator_that_dies_before_the_mark_leaves_the_checkpoint_pending(tracker, model, monkeypatch):
    run = start(tracker)
    run.publish(model, 250, {})
    checkpoint = only(tracker.checkpoints(run.experiment_id))

    def die(model_id: str, tags: dict[str, str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tracker.client, "set_logged_model_tags", die)
    with pytest.raises(KeyboardInterrupt):
        tracker.log_result(checkpoint, identity="x", protocol={}, metrics={"fid": 1.0})
    after = only(tracker.checkpoints(run.experiment_id))
    assert not after.has_result("x")
    assert after.tags["eval_status"] == "pending"


def test_the_command_that_shows_a_local_run_names_its_store_and_page(tracker):
    run = start(tracker)
    command, page = tracker.ui_command(run.run_id, run.experiment_id)
    assert f" server --backend-store-uri {tracker.uri} --host 127.0.0.1 --port 5000" in command
    assert page.partition("?")[0] == f"http://127.0.0.1:5000/#/experiments/{run.experiment_id}/runs/{run.run_id}"


def test_checkpoints_go_to_s3_when_home_is_there(bucket, empty_store, model, tmp_path, monkeypatch):
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    monkeypatch.setenv("DDPM_HOME", f"{bucket}/ddpm")
    tracker = Tracker()
    run = start(tracker)
    run.publish(model, 250, {})
    checkpoint = only(tracker.checkpoints(run.experiment_id))
    assert checkpoint.artifact_uri.startswith(f"{bucket}/ddpm/mlartifacts/ddpm/")
    assert len(list(storage.list_files(f"{bucket}/ddpm"))) == 2
    assert files_of(tracker.download(checkpoint, tmp_path / "copy")) == files_of(model)


@pytest.mark.slow
def test_a_server_that_goes_away_is_one_clear_line(tmp_path, monkeypatch):
    with mlflow_server(tmp_path) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = Tracker()
        run = start(tracker)
    with pytest.raises(WorldError, match=r"^MLflow refused or is away: [^\n]+$"):
        run.finish("FINISHED")


@pytest.mark.slow
def test_the_same_works_over_http_without_access_to_the_store(mlflow_uri, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    tracker = Tracker()
    run = start(tracker, params={"lr": 0.1})
    run.log_metrics([{"step": 25, "loss": 0.5}])
    run.log_grid(np.zeros((8, 8, 3), dtype=np.uint8), step=25)
    run.publish(model, 250, {"data_digest": "abc"})
    checkpoint = only(tracker.checkpoints(run.experiment_id, run_id=run.run_id))
    assert checkpoint.artifact_uri.startswith("mlflow-artifacts:/")
    assert files_of(tracker.download(checkpoint, tmp_path / "copy")) == files_of(model)
    tracker.log_result(checkpoint, identity="x", protocol={}, metrics={"fid": 3.17})
    assert only(tracker.checkpoints(run.experiment_id, run_id=run.run_id)).has_result("x")
    run.finish("FINISHED")
    assert start(tracker).run_id == run.run_id
    assert run.logged_steps("loss") == {25}
    assert tracker.ui_command("r", "e")[0].partition("?")[0] == f"{mlflow_uri}/#/experiments/e/runs/r"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "copy"}
