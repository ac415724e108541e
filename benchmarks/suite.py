"""Everything beside the peers in one run and one table: ``make bench``, or ``python benchmarks/suite.py --help``.

Runs the scripts of this folder one after another, each as a process of its own, and puts what they measured into one
table. A part that fails, or a peer that is not installed, is named in it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from contenders import CONTENDERS
from networks import NETWORKS
from report import machine, markdown, spread

_HERE = Path(__file__).resolve().parent
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures training step, loader, sampling, features, Frechet distance, start and recovery beside the peers."""

    parts: tuple[str, ...] = ()
    """What to measure; default: everything."""
    quick: bool = False
    """One short round of each, to see that all runs; its numbers say little."""
    repeats: int | None = None
    """Rounds of every part; default: what each script takes as enough."""
    mosaicml: Path | None = None
    """Interpreter of the environment that MosaicML Streaming lives in."""
    improved_diffusion: Path | None = None
    """A clone of openai/improved-diffusion."""
    out: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "ddpm-ray-benchmarks" / "suite")
    """Folder for every single measurement, as JSON."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(_PARTS)):
            raise SystemExit(f"--parts {' '.join(unknown)}: give some of {', '.join(_PARTS)}")


@dataclass(frozen=True)
class Row:
    """Ours beside one peer."""

    what: str
    unit: str
    peer: str
    ours: Sequence[float]
    theirs: Sequence[float]
    seconds: bool = False
    """Less is better; else more is."""
    note: str = ""
    """Instead of the peer's numbers, why there are none."""

    def cells(self) -> list[str]:
        """A line of the table."""
        form = ",.2f" if statistics.median(self.ours or [0]) < 100 else ",.0f"
        own = spread(self.ours, form) if self.ours else ""
        if not self.theirs or not self.ours:
            return [f"{self.what}, {self.unit}", own, self.peer, self.note or "not measured", ""]
        pairs = list(zip(self.ours, self.theirs, strict=False))
        ratios = [theirs / ours if self.seconds else ours / theirs for ours, theirs in pairs]
        return [f"{self.what}, {self.unit}", own, self.peer, spread(self.theirs, form), spread(ratios, ".2f")]


@dataclass(frozen=True)
class Part:
    """A script of this folder and what it tells."""

    script: str
    flags: tuple[str, ...]
    quick: tuple[str, ...]
    rows: Callable[[Record], Iterator[Row]]


def main(arguments: Arguments) -> int:
    """Measures and prints the table; 1 if a part failed."""
    facts, rows, failed = machine(), [], []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.parts or tuple(_PARTS):
        started = time.monotonic()
        record, reason = _run(name, _PARTS[name], arguments)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        if record is None:
            failed.append(name)
            rows.append([name, "", "", f"failed: {reason}".replace("|", "/"), ""])
        else:
            rows += [row.cells() for row in _PARTS[name].rows(record)]
    head = ["what, unit", "ours", "peer", "peer's", "how many times better"]
    print(markdown(head, rows, facts))
    print("\nMedians with the range; ratios are taken within each round, above 1 ours is better.")
    if not arguments.parts:
        print(f"\n{_gpu(arguments)}")
    return 1 if failed else 0


def _run(name: str, part: Part, arguments: Arguments) -> tuple[Record | None, str]:
    out = arguments.out / f"{name}.json"
    out.unlink(missing_ok=True)
    flags = [*(part.quick if arguments.quick else part.flags), "--out", str(out)]
    if arguments.repeats is not None:
        flags += ["--repeats", str(arguments.repeats)]
    if name == "loader" and arguments.mosaicml:
        flags += ["--python", "mosaicml", str(arguments.mosaicml)]
    if name == "train_step" and arguments.improved_diffusion:
        flags += ["--improved-diffusion", str(arguments.improved_diffusion)]
    # What a script prints is for whoever runs it alone; here it goes to stderr, where progress is.
    done = subprocess.run([sys.executable, str(_HERE / part.script), *flags], stdout=sys.stderr, check=False)
    if done.returncode or not out.exists():
        return None, f"{part.script} ended with status {done.returncode}"
    record: Record = json.loads(out.read_text())
    return record, ""


def _gpu(arguments: Arguments) -> str:
    flags = ["--out", str(arguments.out / "gpu.json")]
    flags += ["--batch", "64", "--repeats", "2"] if arguments.quick else []
    if arguments.improved_diffusion:
        flags += ["--improved-diffusion", str(arguments.improved_diffusion)]
    command = [sys.executable, str(_HERE / "gpu.py"), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else f"GPU: failed with status {done.returncode}"


def _train_step(record: Record) -> Iterator[Row]:
    ours, *peers = record["results"]
    for peer in peers:
        if peer["name"].startswith("ours"):
            continue
        own, theirs = ([1 / s * each["batch"] for s in each["step_seconds"]] for each in (ours, peer))
        yield Row("train step, CIFAR-10 network", "images/s", _title(peer), own, theirs, note=peer["failed"] or "")


def _title(peer: Record) -> str:
    title, version = NETWORKS[peer["name"]].title, peer.get("version")
    return f"{title}, {version}" if version else title


def _loader(record: Record) -> Iterator[Row]:
    results = {(each["name"], each["processes"]): each for each in record["results"]}
    own = [run["images_per_second"] for run in results["ours", 0]["runs"]]
    for (name, processes), peer in results.items():
        if name.startswith("ours") or processes != 2:
            continue
        theirs = [run["images_per_second"] for run in peer["runs"]]
        title = f"{CONTENDERS[name].title}, 2 processes"
        yield Row("loader, 2 threads", "images/s", title, own, theirs, note=peer["failed"] or "")


def _metrics(record: Record) -> Iterator[Row]:
    parts = record["parts"]
    frechet = parts["frechet"]
    for count, (ours, _, theirs) in (("5,000", frechet[:3]), ("1,000", frechet[3:])):
        yield _seconds(f"Frechet distance of {count} images", ours, theirs)
    features = parts["features"]
    yield _seconds("Inception features, a batch", features[0], features[-1])
    sampling = parts["sampling"]
    yield _seconds("DDIM sampling, a batch", sampling[0], sampling[-1])


def _seconds(what: str, ours: Record, theirs: Record) -> Row:
    own = ours["seconds"] if ours is not theirs else []
    return Row(what, "s", theirs["title"], own, theirs["seconds"], seconds=True, note=theirs["failed"] or "")


def _job(record: Record) -> Iterator[Row]:
    seconds = record["seconds"]
    start, recovery, steps = (seconds.get(part) for part in ("start", "recovery", "steps"))
    if steps:
        for workers in (1, 2):
            own, bare = ([32 / s for s in steps[f"{who}, {workers}"]] for who in ("job", "bare"))
            yield Row(f"a whole job, {workers} worker(s)", "images/s", "bare PyTorch loop, images in memory", own, bare)
    if start:
        yield Row("command to first step", "s", "bare PyTorch loop", start["job"], start["bare"], seconds=True)
    if recovery:
        none = "none: a bare loop ends when a process dies"
        yield Row("kill -9 of a worker to next step", "s", "bare PyTorch loop", recovery["job"], [], note=none)


_NETWORKS = ("--networks", "ours", "diffusers", "improved-diffusion")
_QUICK_METRICS = ("--repeats", "1", "--dim", "256", "--steps", "2", "--batch", "1", "--feature-batch", "2")
_PARTS: dict[str, Part] = {
    "train_step": Part("train_step.py", _NETWORKS, (*_NETWORKS, "--repeats", "1", "--batch", "2"), _train_step),
    "loader": Part("loader.py", ("--repeats", "5"), ("--repeats", "1", "--images", "2000"), _loader),
    "metrics": Part("metrics.py", (), _QUICK_METRICS, _metrics),
    "job": Part(
        "training.py",
        ("--parts", "steps", "start", "recovery"),
        ("--parts", "start", "--repeats", "1"),
        _job,
    ),
}

if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Arguments, description=__doc__)))
