import fcntl
import logging
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from pipeline.training import progress as progress_module
from pipeline.training.progress import Lines, duration, facts, fit_into, line, open_progress
from pipeline.training.worker import Record

ROOT = Path(__file__).resolve().parents[2]


def record(step: int, **values: float) -> Record:
    base = {"step": step, "train/loss": 0.04321, "perf/images_per_second": 1402.4, "perf/step_seconds": 0.05}
    return base | {"perf/data_wait_ratio": 0.031} | values


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.9, "59 s"), (185, "3 min 05 s"), (41_000, "11 h 23 min"), (273_600, "3 d 04 h")],
)
def test_a_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_line_says_step_time_left_loss_speed_distance_wait_and_memory() -> None:
    full = record(625, **{"perf/memory_bytes": 3 * 2**30})
    assert line(full, 1500, step_seconds=0.04, distance=96.14) == (
        "step 625/1,500  35 s left  loss 0.0432  1,402 images/s  distance 96.1  wait 3 %  3.0 GiB"
    )


def test_what_is_not_known_is_left_out_and_the_last_step_has_no_time_left() -> None:
    assert facts(record(1500), 1500, step_seconds=0.04, distance=None) == [
        "done",
        "loss 0.0432",
        "1,402 images/s",
        "wait 3 %",
    ]


def test_a_narrow_terminal_shows_the_first_pieces_whole() -> None:
    pieces = ["35 s left", "loss 0.0432", "1,402 images/s"]
    assert fit_into(100, pieces) == "35 s left  loss 0.0432  1,402 images/s"
    assert fit_into(22, pieces) == "35 s left  loss 0.0432"
    assert fit_into(21, pieces) == "35 s left"
    assert fit_into(5, pieces) == ""


def test_lines_come_at_first_at_last_and_once_a_period_between(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    lines = Lines(100)
    for step in range(10, 101, 10):
        lines.show(record(step))
        now += 8
    assert [message.split()[1] for message in caplog.messages] == ["10/100", "50/100", "90/100", "100/100"]


def test_the_time_left_does_not_jump_with_one_slow_window(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = Lines(100)
    lines.show(record(10, **{"perf/step_seconds": 1.0}))
    lines._next_line = 0.0
    lines.show(record(20, **{"perf/step_seconds": 2.0}))
    assert [message.split("  ")[1] for message in caplog.messages] == ["1 min 30 s left", "1 min 44 s left"]


def test_no_bar_is_drawn_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(open_progress(10, live=True), Lines)
    assert capsys.readouterr().err == ""


def on_a_terminal(script: str, columns: int) -> str:
    """What a script writes to a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        written, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            ready, _, _ = select.select([leader], [], [], 1.0)
            try:
                part = os.read(leader, 65536) if ready else b""
            except OSError:  # Linux says so at the end of a terminal
                break
            written += part
        assert process.wait(10) == 0, written.decode()
    os.close(leader)
    return written.decode()


_SCRIPT = """
import logging, sys
from contextlib import closing
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
library = logging.getLogger("ray")
library.addHandler(logging.StreamHandler(sys.stderr))
library.propagate = False
from pipeline.training.progress import Bar, open_progress
with closing(open_progress(1500, live=True)) as progress:
    assert isinstance(progress, Bar)
    for step in range(500, 1501, 500):
        progress.show({"step": step, "train/loss": 0.5, "perf/images_per_second": 1402.0, "perf/step_seconds": 0.04,
                       "perf/data_wait_ratio": 0.03, "perf/memory_bytes": 2.0**28})
        progress.show_distance(96.1)
        logging.getLogger("pipeline").warning("a line of ours after step %d", step)
        library.warning("a line of a library after step %d", step)
print("the summary")
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_one_bar_is_drawn_and_log_lines_do_not_tear_it(columns: int) -> None:
    output = on_a_terminal(_SCRIPT, columns)
    # What is left of each line of the terminal after its carriage returns.
    screen = [text.rsplit("\r", 1)[-1].rstrip() for text in output.replace("\r\n", "\n").split("\n")]
    shown = [text for text in screen if text]
    assert [text for text in shown if "a line of" in text] == [
        f"a line of {whose} after step {step}" for step in (500, 1000, 1500) for whose in ("ours", "a library")
    ]
    assert max(len(text) for text in shown) < columns
    assert [text for text in shown if "1,500/1,500" in text] == [shown[-2]]
    assert "loss 0.5000" in shown[-2]
    assert "distance 96.1" in shown[-2]
    assert shown[-1] == "the summary"
    assert ("256 MiB" in shown[-2]) == (columns == 120)
