"""Ctrl-C and SIGTERM in the middle of a transaction."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.tracking import Tracker
from pipeline.tracking.interrupts import interrupts_held

INTERRUPTS = 25  # without the hold, about one in eight leaves the database locked


@pytest.fixture(autouse=True)
def sigterm_raises() -> Iterator[None]:
    def interrupt(sign: int, frame: object) -> None:
        raise KeyboardInterrupt(sign)

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def test_an_interrupt_at_any_moment_leaves_the_store_writable_and_each_batch_whole(tracker: Tracker) -> None:
    run = tracker.start_run("stopped", experiment="ddpm", params={"lr": 0.1}, tags={})
    choice = random.Random(0)
    kept, step = [], 0
    for _ in range(INTERRUPTS):
        threading.Timer(choice.random() * 0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            while True:
                step += 1
                run.log_metrics([{"step": step, "train/loss": 0.5, "perf/seconds": 0.1}])
        except KeyboardInterrupt as stop:
            kept.append(stop)  # as a job keeps it while it writes its last records
        began = time.monotonic()
        tracker.client.set_tag(run.run_id, "last", str(step))
        assert time.monotonic() - began < 5
    run.finish("KILLED")
    assert run.logged_steps("train/loss") == run.logged_steps("perf/seconds")
    assert tracker.client.get_run(run.run_id).info.status == "KILLED"


def interrupt_inside(times: int, done: list[str]) -> None:
    with interrupts_held():
        for number in range(times):
            done.append(f"before signal {number}")
            os.kill(os.getpid(), signal.SIGTERM)
        done.append("all of it")


def test_an_interrupt_comes_at_the_end_of_the_block() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_inside(1, done)
    assert done == ["before signal 0", "all of it"]


def test_who_insists_is_heard_at_once() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_inside(2, done)
    assert done == ["before signal 0", "before signal 1"]
    with pytest.raises(KeyboardInterrupt):  # the handler is back in its place
        os.kill(os.getpid(), signal.SIGTERM)


def test_other_threads_hold_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def look() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]
