"""What planning costs in a large data set on many workers: ``python benchmarks/planning.py --help``.

The manifest is synthetic and there are no shards: the order of images is computed from the manifest alone. Needs Linux.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from corpus import make_corpus
from processes import own_memory, peak_since_reset, ready, reset_peak, run_child
from report import MIB, machine, markdown, spread

from pipeline.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, index_name, load_manifest, shard_name
from pipeline.data.order import StreamOrder, streams_of_rank

T = TypeVar("T")
_SEED = 0
_SMALL = 10_000
_SMALL_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures what it takes until a worker knows which images its first step needs."""

    shards: int = 100_000
    """Shards of the data set."""
    images_per_shard: int = 1000
    """Images of each shard."""
    num_workers: int = 1024
    """Workers, and streams of the order."""
    batch_size: int = 4096
    """Images of a global batch."""
    ranks: tuple[int, ...] = (0, 511, 1023)
    """Workers to measure."""
    steps: tuple[int, ...] = (1, 1_000_000)
    """Steps to start at."""
    repeats: int = 5
    """Fresh processes for each worker and step."""
    data: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "ddpm-ray-benchmarks")
    """Folder where the real images are kept for the next run."""
    out: Path | None = None
    """File for all measurements, as JSON."""


def main(arguments: Arguments) -> None:
    """Measures everything and prints the tables."""
    facts = machine()
    runs: dict[tuple[int, int], list[dict[str, Any]]] = {
        (rank, step): [] for rank in arguments.ranks for step in arguments.steps
    }
    opened: dict[int, list[dict[str, Any]]] = {step: [] for step in arguments.steps}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST_NAME
        path.write_text(synthetic_manifest(arguments.shards, arguments.images_per_shard).to_json())
        size = path.stat().st_size / MIB
        task = {"folder": folder, "num_workers": arguments.num_workers, "batch_size": arguments.batch_size}
        small = str(make_corpus(arguments.data.absolute(), "synthetic", _SMALL).shards)
        for _ in range(arguments.repeats):
            for (rank, step), found in runs.items():
                found.append(run_child("planning.py", task | {"rank": rank, "step": step}))
            for step, found in opened.items():
                found.append(run_child("planning.py", {"open": small, "step": step}))
    print(f"{arguments.shards:,} shards of {arguments.images_per_shard:,} images; manifest.json {size:,.1f} MiB")
    print(_table(runs, facts))
    for step, found in opened.items():
        waits = spread([1000 * run["first_batch"]["seconds"] for run in found], ".1f")
        print(f"Opening {_SMALL:,} real images at step {step:,}, until the first batch of 128 is there: {waits} ms.")
    if arguments.out is not None:
        record: list[dict[str, Any]] = [
            {"rank": rank, "step": step, "runs": found} for (rank, step), found in runs.items()
        ]
        record += [{"opened_at": step, "runs": found} for step, found in opened.items()]
        arguments.out.write_text(json.dumps({"machine": facts, "results": record}, indent=2) + "\n")


def synthetic_manifest(num_shards: int, images_per_shard: int) -> Manifest:
    """A manifest of shards that do not exist."""
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(num_shards + 1)]
    shards = tuple(
        ShardInfo(
            name=shard_name(number),
            index=index_name(number),
            num_images=images_per_shard,
            num_bytes=images_per_shard * 4096,
            sha256=digests[number],
            index_sha256=digests[number + 1],
        )
        for number in range(num_shards)
    )
    return Manifest(
        source="synthetic",
        source_fingerprint=digests[0],
        image_size=32,
        image_channels=3,
        class_names=(),
        largest_image_bytes=4096,
        num_images=num_shards * images_per_shard,
        shards=shards,
    )


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Plans in this process: seconds of each part, and peak memory above the imports after it, bytes."""
    found: dict[str, Any] = {}
    ready()
    base = own_memory().rss
    reset_peak()

    def timed(name: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = call()
        found[name] = {"seconds": time.perf_counter() - started, "peak_growth": peak_since_reset() - base}
        return result

    manifest = timed("parse", lambda: load_manifest(task["folder"]))
    order = timed(
        "order",
        lambda: StreamOrder(
            shard_sizes=manifest.shard_sizes,
            batch_size=task["batch_size"],
            num_streams=task["num_workers"],
            seed=_SEED,
        ),
    )
    streams = streams_of_rank(task["num_workers"], task["rank"], task["num_workers"])
    shards, _ = timed("first", lambda: order.locate(task["step"], streams))
    timed("next", lambda: order.locate(task["step"] + 1, streams))
    assert len(shards) == task["batch_size"] // task["num_workers"]
    found["kept"] = own_memory().rss - base
    return found


def measure_opening(task: dict[str, Any]) -> dict[str, Any]:
    """Opens our loader on real images at some step, in this process, and waits for the first batch."""
    torch.set_num_threads(1)
    ready()
    started = time.perf_counter()
    manifest = load_manifest(task["open"])
    config = DataConfig(data=task["open"], batch_size=_SMALL_BATCH)
    order = StreamOrder(
        shard_sizes=manifest.shard_sizes, batch_size=_SMALL_BATCH, num_streams=config.num_streams, seed=_SEED
    )
    first, end = task["step"], task["step"] + 10
    with Loader(
        config.data,
        manifest,
        order,
        config,
        rank=0,
        num_workers=1,
        start_step=first,
        end_step=end,
        finish=lambda batch: batch,
    ) as loader:
        assert next(loader).step == first
        return {"first_batch": {"seconds": time.perf_counter() - started}}


def _table(runs: dict[tuple[int, int], list[dict[str, Any]]], facts: dict[str, Any]) -> str:
    head = [
        "worker",
        "start step",
        "read manifest, s",
        "make order, ms",
        "images of first step, ms",
        "of the next, ms",
    ]
    head += ["peak memory, MiB", "kept, MiB"]
    rows = []
    for (rank, step), found in runs.items():

        def seconds(part: str, found: list[dict[str, Any]] = found) -> list[float]:
            return [run[part]["seconds"] for run in found]

        milliseconds = [spread([1000 * each for each in seconds(part)], ".2f") for part in ("order", "first", "next")]
        peak = spread([run["next"]["peak_growth"] / MIB for run in found])
        kept = spread([run["kept"] / MIB for run in found])
        rows.append([str(rank), f"{step:,}", spread(seconds("parse"), ".2f"), *milliseconds, peak, kept])
    return markdown(head, rows, facts)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        given = json.loads(sys.argv[1])
        print(json.dumps(measure_opening(given) if "open" in given else measure(given)))
    else:
        main(tyro.cli(Arguments, description=__doc__))
