"""Evaluation by one worker and by two, and its memory: ``python benchmarks/evaluation.py --help``.

``jobs/evaluate.py`` runs as a child process, on few and on many images. What both take alike (Ray's start, the network,
the distance) drops out of the difference, which is the speed; the peaks of memory say whether anything grows.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
from report import MIB, machine, markdown, spread

from pipeline.config import PrepareConfig, TrainConfig, override
from pipeline.data.manifest import load_manifest
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.model_folder import EMA_FILE, build_unet, write_meta, write_tensors

_JOB = Path(__file__).resolve().parents[1] / "jobs" / "evaluate.py"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures images a second and the peak of memory."""

    few: int = 200
    """Images of the short evaluation."""
    many: int = 1200
    """Images of the long one."""
    sampling_steps: int = 20
    """Network evaluations of each image."""
    repeats: int = 2
    """Rounds; one worker and two take turns."""
    out: Path | None = None
    """File for all measurements, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation."""

    seconds: float
    bytes: int
    """Peak of the proportional set sizes of the job and all its processes."""


def main(arguments: Arguments) -> None:
    """Measures and prints the table."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ddpm-evaluation-") as name:
        home = Path(name)
        _prepare(home)
        _evaluate(home, 1, arguments.few, arguments.sampling_steps)  # reference statistics are kept
        for number in range(arguments.repeats):
            for workers in (1, 2):
                few, many = (
                    _evaluate(home, workers, count, arguments.sampling_steps)
                    for count in (arguments.few, arguments.many)
                )
                rate = (arguments.many - arguments.few) / (many.seconds - few.seconds)
                found.setdefault(f"rate, {workers}", []).append(rate)
                found.setdefault(f"memory of few, {workers}", []).append(few.bytes / MIB)
                found.setdefault(f"memory of many, {workers}", []).append(many.bytes / MIB)
            print(f"round {number + 1} of {arguments.repeats} done", file=sys.stderr, flush=True)
    facts = machine()
    print(markdown(*_table(found, arguments), facts))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": facts, "measured": found}, indent=2) + "\n")


def _table(found: dict[str, list[float]], arguments: Arguments) -> tuple[list[str], list[list[str]]]:
    head = ["evaluation of the digits", "images/s", "of one worker"]
    head += [f"peak with {count:,} images, MiB" for count in (arguments.few, arguments.many)]
    rows = []
    for workers in (1, 2):
        rates, one = found[f"rate, {workers}"], found["rate, 1"]
        ratios = [rate / base for rate, base in zip(rates, one, strict=True)]
        memory = [spread(found[f"memory of {which}, {workers}"], ".0f") for which in ("few", "many")]
        rows.append([f"{workers} x 1 thread", spread(rates, ".1f"), spread(ratios, ".2f"), *memory])
    return head, rows


def _prepare(home: Path) -> None:
    location = home / "data" / "digits"
    prepare(open_source("digits"), PrepareConfig(), str(location))
    config = override(TrainConfig(), {"name": "measured"})
    folder = home / "model"
    folder.mkdir()
    write_tensors(folder, EMA_FILE, build_unet(config.model).state_dict())
    data = {"location": str(location), "digest": load_manifest(str(location)).digest}
    write_meta(folder, step=1, config=config, data=data, code={})


def _evaluate(home: Path, workers: int, num_images: int, sampling_steps: int) -> Evaluated:
    environment = os.environ | {"DDPM_HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    flags: list[Any] = ["--checkpoint", home / "model", "--reference", "digits", "--json"]
    flags += ["--num-workers", workers, "--num-images", num_images, "--sampling-steps", sampling_steps]
    command = [sys.executable, str(_JOB), *map(str, flags), "--chunk-size", "50"]
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, _memory(psutil.Process(process.pid)))
        time.sleep(1.0)
    if process.returncode != 0:
        raise SystemExit(f"jobs/evaluate.py failed: {process.communicate()[1].strip().splitlines()[-1:]}")
    return Evaluated(seconds=time.monotonic() - started, bytes=peak)


def _memory(root: psutil.Process) -> int:
    total = 0
    for process in [root, *_children(root)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = root.children(recursive=True)
    except psutil.Error:
        return []
    return found


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
