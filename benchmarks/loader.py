"""Speed and memory of our loader beside others, on the same images: ``python benchmarks/loader.py --help``.

Needs Linux. Peers that are not installed are named in the result: ``pip install -r benchmarks/requirements.txt``.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro
from contenders import CONTENDERS, OURS, OURS_IN_ONE_THREAD
from corpus import Corpus, make_corpus, offline_environment
from processes import ChildError, run_child
from report import MIB, machine, markdown, spread

_SCRIPT = "measure.py"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures loaders: images/s of a shuffled epoch, time to the first batch, memory."""

    images: int = 10_000
    """Images of the data set, 32x32 RGB."""
    repeats: int = 5
    """Measurements of each contender, in rounds."""
    peers: tuple[str, ...] = tuple(CONTENDERS)
    """Whom to measure; ours is always measured."""
    source: str = "synthetic"
    """synthetic, or folder:PATH with images in class folders."""
    data: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "ddpm-ray-benchmarks")
    """Folder where the images are kept for the next run."""
    python: dict[str, Path] = field(default_factory=dict)
    """Interpreters of peers that need an environment of their own: --python mosaicml PATH."""
    out: Path | None = None
    """File for all measurements, as JSON."""

    def __post_init__(self) -> None:
        unknown = sorted((set(self.peers) | set(self.python)) - set(CONTENDERS))
        if unknown:
            raise SystemExit(f"no contender is called {' or '.join(unknown)}; give some of {', '.join(CONTENDERS)}")
        if self.repeats < 1 or self.images < 2000:
            raise SystemExit("--repeats takes at least 1, --images at least 2000: a shard for each loader process")


@dataclass
class Result:
    """What was measured of a contender with a number of loader processes, and the interpreter for it."""

    name: str
    processes: int
    python: Path | None = None
    versions: dict[str, str] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    memory_growth: dict[str, int] = field(default_factory=dict)
    failed: str | None = None

    def values(self, key: str) -> list[float]:
        """Of all runs."""
        return [run[key] for run in self.runs if run[key] is not None]


def main(arguments: Arguments) -> None:
    """Measures everything and prints the table."""
    facts = machine()
    corpus = make_corpus(arguments.data.absolute(), arguments.source, arguments.images)
    names = [name for name in CONTENDERS if name in (OURS, OURS_IN_ONE_THREAD, *arguments.peers)]
    results = [
        Result(name, processes, arguments.python.get(name))
        for name in names
        for processes in CONTENDERS[name].processes
    ]
    for result in results:
        if CONTENDERS[result.name].format is not None:
            _child(corpus, result, write=True)
    for number in range(arguments.repeats + 1):
        # Contenders take turns, and another one begins each round: what changes on the machine meets all alike.
        turn = number * len(results) // (arguments.repeats + 1)
        for result in results[turn:] + results[:turn]:
            _measure(corpus, result, check=number == 0)
        _say(f"round {number} of {arguments.repeats} done")
    print(_table(results, facts))
    print(f"{corpus.num_images:,} PNG images of {corpus.mean_bytes:,.0f} bytes on average, {_source(arguments)}.")
    if arguments.out is not None:
        record = {
            "machine": facts,
            "corpus": {"source": _source(arguments), "images": corpus.num_images, "mean_bytes": corpus.mean_bytes},
            "results": [asdict(result) | {"python": None} for result in results],
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def _measure(corpus: Corpus, result: Result, *, check: bool) -> None:
    """One measurement. The round that checks also warms the page cache and takes the memory, and no times."""
    found = _child(corpus, result, check=check)
    if found is None:
        return
    memory = found.pop("memory_growth")
    result.versions = found.pop("versions")
    if check:
        result.memory_growth = memory
    else:
        result.runs.append(found)


def _child(corpus: Corpus, result: Result, *, check: bool = False, write: bool = False) -> dict[str, Any] | None:
    """What a process of its own found; None, and the reason in the result, if this contender cannot be measured."""
    if result.failed:
        return None
    task = {
        "contender": result.name,
        "corpus": _fields(corpus),
        "processes": result.processes,
        "check": check,
        "write": write,
    }
    try:
        return run_child(_SCRIPT, task, timeout=300, pss=check, env=offline_environment(), python=result.python)
    except ChildError as error:
        result.failed = str(error)
        _say(f"{result.name} with {result.processes} processes failed: {error}")
        return None


def _fields(corpus: Corpus) -> dict[str, Any]:
    return asdict(corpus) | {"root": str(corpus.root)}


def _source(arguments: Arguments) -> str:
    return "synthetic" if arguments.source == "synthetic" else "from a folder"


def _table(results: list[Result], facts: dict[str, Any]) -> str:
    head = ["loader", "reads in", "images/s", "ours / this", "first batch, s", "memory, MiB", "(RSS sum, MiB)"]
    ours = {result.name: result.values("images_per_second") for result in results if result.processes == 0}
    return markdown(head, [_row(result, ours) for result in results], facts)


def _row(result: Result, ours: dict[str, list[float]]) -> list[str]:
    """A line of the table; its ratio is to our first epoch with as many threads as this one has threads or processes.

    Where there is one loader process beside an idle main process, that is one thread.
    """
    contender = CONTENDERS[result.name]
    title = ", ".join([contender.title, *(f"{name} {version}" for name, version in result.versions.items())])
    number, unit = (result.processes, "process") if result.processes else (contender.threads, "thread")
    reads_in = f"{number} {unit}" + ("" if number == 1 else "es" if result.processes else "s")
    if result.failed:
        return [title, reads_in, f"failed: {result.failed.replace('|', '/')}", "", "", "", ""]
    same = ours[OURS_IN_ONE_THREAD if number == 1 else OURS]
    speeds, waits = result.values("images_per_second"), result.values("first_batch_seconds")
    memory = result.memory_growth
    return [
        title,
        reads_in,
        spread(speeds),
        f"{statistics.median(same) / statistics.median(speeds):.2f}" if same else "",
        spread(waits, ".2f") if waits else "",
        f"{memory['pss'] / MIB:,.0f}",
        f"{memory['rss'] / MIB:,.0f}",
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
