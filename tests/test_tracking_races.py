"""Several drivers of one name at the same moment, in processes of their own, on real stores."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking import Tracker

ROUNDS, DRIVERS = 5, 4

DRIVER = """
import sys, time
from pipeline.errors import UserError, WorldError
from pipeline.tracking import Tracker

tracker = Tracker()
print("ready", flush=True)
for name in iter(sys.stdin.readline, ""):
    name, moment = name.split()
    time.sleep(max(0.0, float(moment) - time.time()))
    try:
        run = tracker.start_run(name, experiment="ddpm", params={"lr": 0.1}, tags={})
        print("owns", run.run_id, flush=True)
    except (UserError, WorldError) as error:
        print("refused", error, flush=True)
"""


def spawn(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that begin with a store that does not exist yet, all at once."""
    processes = [spawn(DRIVER) for _ in range(DRIVERS)]
    try:
        assert [hear(process) for process in processes] == ["ready"] * DRIVERS
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def check_race(drivers: list[subprocess.Popen[str]], name: str, tracker: Tracker) -> None:
    moment = time.time() + 0.2
    for process in drivers:
        say(process, f"{name} {moment}")
    answers = [hear(process) for process in drivers]
    owners = [answer for answer in answers if answer.startswith("owns")]
    refused = [answer for answer in answers if answer.startswith(f"refused run '{name}' is being written by a live")]
    assert (len(owners), len(refused)) == (1, DRIVERS - 1), answers
    experiment = tracker.experiment("ddpm", create=False)
    runs = tracker.client.search_runs([experiment], f"attributes.run_name = '{name}'")
    assert [f"owns {run.info.run_id}" for run in runs] == owners
    assert runs[0].info.status == "RUNNING"
    assert tracker.params(runs[0].info.run_id) == {"lr": "0.1"}


@pytest.mark.slow
def test_of_drivers_that_start_at_the_same_moment_exactly_one_goes_on(drivers: list[subprocess.Popen[str]]) -> None:
    tracker = Tracker()
    for number in range(ROUNDS):
        check_race(drivers, f"new-{number}", tracker)
    for number in range(ROUNDS):
        tracker.start_run(f"again-{number}", experiment="ddpm", params={"lr": 0.1}, tags={}).finish("FAILED")
        check_race(drivers, f"again-{number}", tracker)


@pytest.mark.slow
def test_of_drivers_that_start_at_the_same_moment_exactly_one_goes_on_over_http(
    mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    tracker = Tracker()
    processes = [spawn(DRIVER) for _ in range(DRIVERS)]
    try:
        assert [hear(process) for process in processes] == ["ready"] * DRIVERS
        for number in range(ROUNDS):
            check_race(processes, f"race-{number}", tracker)
        tracker.start_run("race-again", experiment="ddpm", params={"lr": 0.1}, tags={}).finish("FAILED")
        check_race(processes, "race-again", tracker)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


WRITER = """
import sys
from pipeline.tracking import TakenOverError, Tracker

run = Tracker().start_run("run", experiment="ddpm", params={}, tags={})
print("owns", flush=True)
for step in iter(sys.stdin.readline, ""):
    try:
        run.log_metrics([{"step": int(step), "loss": 0.5}])
        print("logged", flush=True)
    except TakenOverError as error:
        print(error, flush=True)
"""


@pytest.mark.slow
def test_a_driver_that_wakes_up_after_it_was_replaced_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.ownership.STALE_SECONDS", 2.0)
    first = spawn(WRITER)
    try:
        assert hear(first) == "owns"
        say(first, "1")
        assert hear(first) == "logged"
        first.send_signal(signal.SIGSTOP)
        say(first, "2")
        time.sleep(2.5)
        run = Tracker().start_run("run", experiment="ddpm", params={}, tags={})
        first.send_signal(signal.SIGCONT)
        assert hear(first).startswith("another driver has taken over run run (")
        assert run.logged_steps("loss") == {1}
    finally:
        first.kill()
        first.communicate()
