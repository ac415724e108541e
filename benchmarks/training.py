"""What a job costs around its training steps: ``python benchmarks/training.py --help``.

``jobs/train.py`` runs as its users run it and is watched from outside. Contenders take turns, so that a slow minute of
the machine meets all alike.
"""

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
from corpus import make_corpus
from job import Job
from report import machine, markdown, spread

_HERE = Path(__file__).resolve().parent
# The network of the CIFAR-10 preset at a quarter of its width: 2.2 M parameters. Attention at 16x16, dropout 0.1.
_SMALL: dict[str, Any] = {"base_channels": 32, "batch_size": 32, "num_streams": 2}
_FIRST, _LAST = 10, 50


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures steps beside a bare loop, scaling, start, recovery after kill -9, and what a checkpoint costs."""

    repeats: int = 3
    """Rounds of each part."""
    parts: tuple[str, ...] = ("steps", "start", "recovery", "checkpoint")
    """What to measure."""
    folder: Path = Path(tempfile.gettempdir()) / "ddpm-ray-benchmarks"
    """Images are made here and kept; jobs run here."""
    out: Path | None = None
    """File for all measurements, as JSON."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(_PARTS))
        if unknown or self.repeats < 1:
            raise SystemExit(f"--parts takes some of {', '.join(_PARTS)}, --repeats at least 1")


Seconds = dict[str, list[float]]
"""Measurements by name."""


def main(arguments: Arguments) -> None:
    """Measures and prints a table for each part."""
    facts = machine()
    corpus = make_corpus(arguments.folder, "synthetic", 10_000)
    found: dict[str, Seconds] = {}
    for part in arguments.parts:
        seconds = found[part] = {}
        for number in range(arguments.repeats):
            _PARTS[part](seconds, str(corpus.shards), arguments.folder)
            print(f"{part}: round {number + 1} of {arguments.repeats} done", file=sys.stderr, flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps({"machine": facts, "seconds": found}, indent=2) + "\n")
        head, rows = _TABLES[part](seconds)
        print(markdown(head, rows, facts) + "\n", flush=True)


def _steps(seconds: Seconds, data: str, folder: Path) -> None:
    for workers in (1, 2):
        per_step = seconds.setdefault(f"job, {workers}", [])
        flags = ["--preset", "cifar10", "--data", data, *_flags(_SMALL), "--num-workers", str(workers)]
        flags += ["--cpus-per-worker", "1", "--steps", str(_LAST + 1), "--quality-images", "0", "--grid-images", "1"]
        with _job(folder, [*flags, "--sampling-steps", "1"]) as job:
            per_step.append(job.step_times(_FIRST, _LAST) / (_LAST - _FIRST))
            job.result()
        bare = _bare({"preset": "cifar10", "knobs": _SMALL, "workers": workers, "first": _FIRST, "last": _LAST})
        seconds.setdefault(f"bare, {workers}", []).append(bare["seconds"] / (_LAST - _FIRST))


def _start(seconds: Seconds, data: str, folder: Path) -> None:
    with _job(folder, [*_digits(folder, steps=20)]) as job:
        seconds.setdefault("job", []).append(job.wait_for_lines(2) - job.started)
        job.result()
    started = time.time()
    bare = _bare({"preset": "digits", "knobs": {}, "workers": 2, "first": 0, "last": 2})
    seconds.setdefault("bare", []).append(bare["first_step_at"] - started)


def _recovery(seconds: Seconds, data: str, folder: Path) -> None:
    with _job(folder, [*_digits(folder, steps=100_000), "--checkpoint-every", "100"]) as job:
        job.wait_for_lines(150)
        for _ in range(2):
            time.sleep(random.uniform(5, 15))
            victim = random.choice(job.workers())
            before = job.lines()
            victim.send_signal(9)
            killed = time.monotonic()
            psutil.wait_procs([victim], timeout=10)
            # The other worker may still end the step that it is in.
            time.sleep(0.5)
            before = max(before, job.lines())
            seconds.setdefault("job", []).append(job.wait_for_lines(before + 2) - killed)


def _checkpoint(seconds: Seconds, data: str, folder: Path) -> None:
    output = subprocess.run(
        [sys.executable, str(_HERE / "checkpoint_cost.py"), data], check=True, capture_output=True, text=True
    )
    for name, values in json.loads(output.stdout.strip().splitlines()[-1]).items():
        seconds.setdefault(name, []).extend(values)


_PARTS: dict[str, Callable[[Seconds, str, Path], None]] = {
    "steps": _steps,
    "start": _start,
    "recovery": _recovery,
    "checkpoint": _checkpoint,
}


def _steps_table(seconds: Seconds) -> tuple[list[str], list[list[str]]]:
    batch = _SMALL["batch_size"]
    one = seconds["job, 1"]
    rows = []
    for workers in (1, 2):
        for who, title in (("job", "`jobs/train.py`"), ("bare", "bare PyTorch loop")):
            own = seconds[f"{who}, {workers}"]
            rates = spread([batch / value for value in own], ".1f")
            against_bare = _ratio(seconds[f"bare, {workers}"], own)
            rows.append([f"{title}, {workers} x 1 thread", rates, against_bare, _ratio(one, own)])
    return ["one training step, 2.2 M parameters, batch 32", "images/s", "of the bare loop", "of one worker"], rows


def _start_table(seconds: Seconds) -> tuple[list[str], list[list[str]]]:
    rows = [["`jobs/train.py`", spread(seconds["job"], ".1f")], ["bare PyTorch loop", spread(seconds["bare"], ".1f")]]
    return ["from the command to the end of the first step, 2 workers, cold", "s"], rows


def _recovery_table(seconds: Seconds) -> tuple[list[str], list[list[str]]]:
    return ["from kill -9 of one of 2 workers to the end of the next step", "s"], [
        ["`jobs/train.py`", spread(seconds["job"], ".1f")]
    ]


def _checkpoint_table(seconds: Seconds) -> tuple[list[str], list[list[str]]]:
    step = statistics.median(seconds["step"])
    extra = seconds["extra"]
    part = [100 * value / (100 * step) for value in extra]
    head = ["35.7 M parameters, batch 8, 2 threads", "s", "of 100 steps, %"]
    return head, [
        ["a step", spread(seconds["step"], ".2f"), ""],
        ["a checkpoint, in longer steps", spread(extra, ".2f"), spread(part, ".2f")],
        ["of which the step waits for the copy", spread(seconds["copy"], ".2f"), ""],
    ]


_TABLES: dict[str, Callable[[Seconds], tuple[list[str], list[list[str]]]]] = {
    "steps": _steps_table,
    "start": _start_table,
    "recovery": _recovery_table,
    "checkpoint": _checkpoint_table,
}


def _ratio(theirs: Sequence[float], own: Sequence[float]) -> str:
    return f"{statistics.median([a / b for a, b in zip(theirs, own, strict=True)]):.2f}"


def _job(folder: Path, flags: Sequence[str]) -> Job:
    home = folder / "job"
    shutil.rmtree(home, ignore_errors=True)
    return Job(home, [*flags, "--name", "measured"])


def _digits(folder: Path, *, steps: int) -> list[str]:
    """The digits with two workers; the data set lies outside the job's home, which is new each time."""
    from pipeline.config import PrepareConfig
    from pipeline.data.prepare import prepare
    from pipeline.data.sources import open_source

    location = str(folder / "digits")
    prepare(open_source("digits"), PrepareConfig(), location)
    return [
        "--preset",
        "digits",
        "--data",
        location,
        "--num-workers",
        "2",
        "--cpus-per-worker",
        "1",
        "--steps",
        str(steps),
    ]


def _bare(arguments: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(_HERE / "bare_loop.py"), json.dumps(arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def _flags(knobs: dict[str, Any]) -> list[str]:
    return [word for name, value in knobs.items() for word in (f"--{name.replace('_', '-')}", str(value))]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
