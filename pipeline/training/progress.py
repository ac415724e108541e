"""What a person sees while a run trains: one live bar on a terminal, a plain line every half minute elsewhere.

Workers never draw: their records reach the driver, and the driver alone writes to the terminal.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.training.worker import Record

__all__ = ["Bar", "Lines", "Progress", "Several", "duration", "facts", "fit_into", "line", "open_progress"]

logger = logging.getLogger(__name__)

_LINE_SECONDS = 30.0
_SHORTEST_BAR = 8
_BETWEEN = "  "
_SMOOTHING = 0.3
"""Share of the newest window in the duration of a step that the remaining time is computed from."""


class Progress(Protocol):
    """Shows records as they come; ``close`` gives the terminal back."""

    def show(self, record: Record) -> None:
        """Shows the metrics of one logging window."""
        ...

    def show_distance(self, value: float) -> None:
        """Shows the last distance beside the metrics that follow."""
        ...

    def close(self) -> None:
        """Ends the display; nothing is shown afterwards."""
        ...


def open_progress(steps: int, *, live: bool) -> Progress:
    """A bar if ``live`` and stderr is a terminal, else lines.

    Args:
        steps: Optimizer steps of the whole run.
        live: Whether a bar is wanted at all; not by ``--json`` or within a sweep.
    """
    return Bar(steps) if live and sys.stderr.isatty() else Lines(steps)


def facts(record: Record, steps: int, *, step_seconds: float, distance: float | None) -> list[str]:
    """What a record says, in a few short pieces, the most important first.

    Args:
        record: Metrics of a window; ``perf/memory_bytes`` may be missing.
        steps: Optimizer steps of the whole run.
        step_seconds: Duration of a step, from which the remaining time follows.
        distance: The last one measured, if any.
    """
    pieces = [
        f"{duration((steps - record['step']) * step_seconds)} left" if record["step"] < steps else "done",
        f"loss {record['train/loss']:.4f}",
        f"{record['perf/images_per_second']:,.0f} images/s",
    ]
    if distance is not None:
        pieces.append(f"distance {distance:.1f}")
    pieces.append(f"wait {100 * record['perf/data_wait_ratio']:.0f} %")
    if (memory := record.get("perf/memory_bytes")) is not None:
        pieces.append(_size(memory))
    return pieces


def fit_into(width: int, pieces: Sequence[str]) -> str:
    """Joins as many of the first pieces as fit into ``width`` columns."""
    text = ""
    for piece in pieces:
        longer = f"{text}{_BETWEEN}{piece}" if text else piece
        if len(longer) > width:
            break
        text = longer
    return text


def line(record: Record, steps: int, *, step_seconds: float, distance: float | None) -> str:
    """A record as one line of a log."""
    pieces = facts(record, steps, step_seconds=step_seconds, distance=distance)
    return _BETWEEN.join([f"step {record['step']:,}/{steps:,}", *pieces])


def duration(seconds: float) -> str:
    """A duration as a person reads it: 42 s, 3 min 05 s, 11 h 23 min, 3 d 04 h."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


class Several:
    """Several displays as one."""

    def __init__(self, *displays: Progress) -> None:
        self._displays = displays

    def show(self, record: Record) -> None:
        """Shows the record on each of them."""
        for display in self._displays:
            display.show(record)

    def show_distance(self, value: float) -> None:
        """Shows the distance on each of them."""
        for display in self._displays:
            display.show_distance(value)

    def close(self) -> None:
        """Ends each of them."""
        for display in self._displays:
            display.close()


class _Pace:
    """Duration of a step, smoothed over logging windows, so that the remaining time does not jump."""

    def __init__(self) -> None:
        self._step_seconds: float | None = None

    def of(self, record: Record) -> float:
        """Takes one window in and returns the smoothed duration, seconds."""
        newest, before = record["perf/step_seconds"], self._step_seconds
        self._step_seconds = newest if before is None else before + _SMOOTHING * (newest - before)
        return self._step_seconds


class Lines:
    """Plain log lines: the first record, the last one, and one every ``_LINE_SECONDS`` between them."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._pace = _Pace()
        self._next_line = time.monotonic()
        self._distance: float | None = None

    def show(self, record: Record) -> None:
        """Logs the record if a line is due."""
        step_seconds = self._pace.of(record)
        if time.monotonic() < self._next_line and record["step"] < self._steps:
            return
        self._next_line = time.monotonic() + _LINE_SECONDS
        logger.info("%s", line(record, self._steps, step_seconds=step_seconds, distance=self._distance))

    def show_distance(self, value: float) -> None:
        """Shown by the next line."""
        self._distance = value

    def close(self) -> None:
        """Nothing to end."""


class Bar:
    """One line at the bottom of the terminal; log lines of all modules scroll by above it."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._pace = _Pace()
        self._distance: float | None = None
        self._record: Record | None = None
        self._step_seconds = 0.0
        self._cleanup = contextlib.ExitStack()
        # Ray and MLflow log through handlers of their own, which would write into the bar.
        owners = [logging.getLogger(name) for name in (None, "ray", "mlflow")]
        owners = [owner for owner in owners if owner.handlers]
        self._cleanup.enter_context(logging_redirect_tqdm(owners))
        self._bar: tqdm[None] = tqdm(
            total=steps,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format=f"{{n:>{len(f'{steps:,}')},}}/{{total:,}} |{{bar}}| {{desc}}",
            mininterval=0,
        )
        self._cleanup.callback(self._bar.close)
        self._bar.set_description_str("starting workers")

    def show(self, record: Record) -> None:
        """Redraws the bar."""
        self._record, self._step_seconds = record, self._pace.of(record)
        self._bar.n = int(record["step"])
        self._draw()

    def show_distance(self, value: float) -> None:
        """Redraws the bar."""
        self._distance = value
        self._draw()

    def close(self) -> None:
        """Leaves the bar as it is, a line of the terminal's history."""
        self._cleanup.close()

    def _draw(self) -> None:
        if self._record is None:
            return
        pieces = facts(self._record, self._steps, step_seconds=self._step_seconds, distance=self._distance)
        around = len(f"{self._steps:,}/{self._steps:,} || ") + _SHORTEST_BAR
        room = os.get_terminal_size(sys.stderr.fileno()).columns - 1 - around
        self._bar.set_description_str(fit_into(room, pieces))
