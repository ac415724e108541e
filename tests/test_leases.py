"""Leases on checkpoints in a real MLflow store: one evaluator at a time, and none for ever."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_tracking_races import hear, say, spawn

from pipeline.tracking import Checkpoint, Lease, LostLeaseError, Tracker, ownership, standing
from pipeline.tracking.leases import _State
from pipeline.tracking.ownership import Claim

IDENTITY = "0123456789abcdef"


def publish(tracker: Tracker, folder: Path, count: int = 1) -> list[Checkpoint]:
    """Published checkpoints of one run, newest first."""
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text("{}\n")
    run = tracker.start_run("run", experiment="ddpm", params={}, tags={})
    for step in range(1, count + 1):
        run.publish(folder, step, {})
    return tracker.checkpoints(run.experiment_id)


@pytest.fixture
def checkpoint(tracker: Tracker, tmp_path: Path) -> Checkpoint:
    """A published checkpoint."""
    return publish(tracker, tmp_path / "model")[0]


def take(tracker: Tracker, checkpoint: Checkpoint) -> Lease | None:
    """Takes a lease by what MLflow says now."""
    now = tracker.refresh(checkpoint)
    return tracker.take_lease(now, IDENTITY, standing(now, IDENTITY))


def holder(tracker: Tracker, checkpoint: Checkpoint) -> str | None:
    found = standing(tracker.refresh(checkpoint), IDENTITY).holder
    return None if found is None else found.owner


def leave_behind(tracker: Tracker, checkpoint: Checkpoint, claim: Claim, **state: object) -> None:
    """The lease of an evaluator that says no more."""
    tracker.client.log_model_params(checkpoint.model_id, {f"ddpm.lease.{IDENTITY}.{claim.number}": claim.to_json()})
    said = replace(_State(number=claim.number, state="running", time=claim.time), **state)  # type: ignore[arg-type]
    tracker.client.set_logged_model_tags(checkpoint.model_id, {f"lease.{IDENTITY}": json.dumps(asdict(said))})


def elsewhere(number: int, silent: float) -> Claim:
    """An evaluator on another machine that was heard of some seconds ago."""
    return Claim(number=number, host="another-host", machine="another", pid=1, time=time.time() - silent)


@contextmanager
def ended_process() -> Iterator[int]:
    """The number of a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    yield process.pid


def test_a_leased_checkpoint_names_its_holder_and_is_free_again_afterwards(
    tracker: Tracker, checkpoint: Checkpoint
) -> None:
    lease = take(tracker, checkpoint)
    assert lease is not None
    with lease:
        assert holder(tracker, checkpoint) == Claim(number=1).owner
    assert holder(tracker, checkpoint) is None
    assert standing(tracker.refresh(checkpoint), IDENTITY).number == 1


def test_a_lease_is_for_one_protocol(tracker: Tracker, checkpoint: Checkpoint) -> None:
    assert take(tracker, checkpoint) is not None
    assert standing(tracker.refresh(checkpoint), "another").holder is None


def test_of_two_that_saw_a_free_checkpoint_one_gets_it(tracker: Tracker, checkpoint: Checkpoint) -> None:
    stands = standing(checkpoint, IDENTITY)
    assert tracker.take_lease(checkpoint, IDENTITY, stands) is not None
    assert tracker.take_lease(checkpoint, IDENTITY, stands) is None


def test_the_lease_of_a_dead_process_of_this_machine_is_over_at_once(tracker: Tracker, checkpoint: Checkpoint) -> None:
    with ended_process() as pid:
        leave_behind(tracker, checkpoint, Claim(number=1, pid=pid), chunks=2)
    stands = standing(tracker.refresh(checkpoint), IDENTITY)
    assert (stands.holder, stands.failures) == (None, 0)
    assert take(tracker, checkpoint) is not None


def test_the_lease_of_another_machine_runs_out(tracker: Tracker, checkpoint: Checkpoint) -> None:
    leave_behind(tracker, checkpoint, elsewhere(1, silent=140))
    assert holder(tracker, checkpoint) == "another-host:1"
    leave_behind(tracker, checkpoint, elsewhere(2, silent=160))
    assert holder(tracker, checkpoint) is None


def test_a_heartbeat_keeps_a_lease_and_a_replaced_holder_is_told(
    tracker: Tracker, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
    lease = take(tracker, checkpoint)
    assert lease is not None
    with lease:
        before = json.loads(tracker.refresh(checkpoint).tags[f"lease.{IDENTITY}"])["time"]
        deadline = time.monotonic() + 20
        while json.loads(tracker.refresh(checkpoint).tags[f"lease.{IDENTITY}"])["time"] == before:
            assert time.monotonic() < deadline
        leave_behind(tracker, checkpoint, elsewhere(2, silent=0))
        with pytest.raises(LostLeaseError, match="another evaluator has taken over run step 1"):
            lease.check()
        while not lease.is_lost:
            assert time.monotonic() < deadline
    assert holder(tracker, checkpoint) == "another-host:1", "the one that lost it said nothing more"
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_three_failures_mark_a_checkpoint_failed_and_a_success_forgets_them(
    tracker: Tracker, checkpoint: Checkpoint
) -> None:
    for failures in (1, 2, 3):
        assert not standing(tracker.refresh(checkpoint), IDENTITY).has_failed
        lease = take(tracker, checkpoint)
        assert lease is not None
        with lease:
            lease.fail("its weights are damaged")
        stands = standing(tracker.refresh(checkpoint), IDENTITY)
        assert (stands.failures, stands.reason) == (failures, "its weights are damaged")
    assert stands.has_failed
    assert tracker.refresh(checkpoint).tags["eval_status"] == "failed"
    lease = take(tracker, checkpoint)
    assert lease is not None
    with lease:
        pass
    assert standing(tracker.refresh(checkpoint), IDENTITY).failures == 0


def test_evaluators_that_die_without_getting_on_count_as_failures(tracker: Tracker, checkpoint: Checkpoint) -> None:
    with ended_process() as pid:
        leave_behind(tracker, checkpoint, Claim(number=1, pid=pid), failures=2)
        stands = standing(tracker.refresh(checkpoint), IDENTITY)
        assert stands.has_failed
        assert "died before the first chunk was done" in stands.reason


def test_an_interruption_is_no_failure(tracker: Tracker, checkpoint: Checkpoint) -> None:
    lease = take(tracker, checkpoint)
    assert lease is not None
    with pytest.raises(KeyboardInterrupt), lease:
        raise KeyboardInterrupt
    stands = standing(tracker.refresh(checkpoint), IDENTITY)
    assert (stands.holder, stands.failures) == (None, 0)


EVALUATOR = f"""
import sys, time
from pipeline.tracking import Tracker, standing

tracker = Tracker()
print("ready", flush=True)
for moment in iter(sys.stdin.readline, ""):
    found = tracker.checkpoints(tracker.experiment("ddpm", create=False))
    time.sleep(max(0.0, float(moment) - time.time()))
    won = []
    for checkpoint in found:
        lease = tracker.take_lease(checkpoint, "{IDENTITY}", standing(checkpoint, "{IDENTITY}"))
        if lease is not None and checkpoint.run_id == "RUN":
            won.append(checkpoint.step)
    print(*won, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "http", "postgres"])
def test_of_evaluators_that_start_at_the_same_moment_one_gets_each_checkpoint(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if store != "sqlite":
        uri = request.getfixturevalue("mlflow_uri" if store == "http" else "postgres_uri")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    count = 8
    run_id = publish(Tracker(), tmp_path / "model", count)[0].run_id
    evaluators = [spawn(EVALUATOR.replace("RUN", run_id)) for _ in range(3)]
    try:
        assert [hear(process) for process in evaluators] == ["ready"] * 3
        moment = time.time() + 1
        for process in evaluators:
            say(process, str(moment))
        answers = [hear(process) for process in evaluators]
    finally:
        for process in evaluators:
            process.kill()
            process.communicate()
    assert sorted(int(step) for answer in answers for step in answer.split()) == list(range(1, count + 1)), answers
