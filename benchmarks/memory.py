"""Memory of our loader on 1 GB of large images beside the bound it states: ``python benchmarks/memory.py --help``.

Needs Linux.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from processes import own_memory, peak_since_reset, ready, reset_peak, run_child
from report import MIB, machine, markdown

from pipeline.config import DataConfig, PrepareConfig
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_manifest
from pipeline.data.order import StreamOrder
from pipeline.data.prepare import prepare
from pipeline.data.read_plan import plan_reading
from pipeline.data.sources import Sample, sample_key

_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures the peak memory of reading."""

    megabytes: int = 1000
    """Size of the data set: noise, PNG, 256x256 RGB, about 0.2 MB an image."""
    batches: int = 100
    """Batches to read."""
    batch_size: int = 64
    """Images of a batch."""
    loader_workers: tuple[int, ...] = (0, 2)
    """Loader processes."""
    cache_mib: tuple[int, ...] = (0, 64, 256)
    """Sizes of the memory for decoded images, MiB."""
    data: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "ddpm-ray-benchmarks")
    """Folder where the images are kept for the next run."""
    out: Path | None = None
    """File for all measurements, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A source of images that nothing can compress."""

    num_images: int
    image_size: int = _SIZE
    image_channels: int = 3
    class_names: tuple[str, ...] = ()
    reads_in_driver: bool = False
    name: str = "noise"

    def __len__(self) -> int:
        """Number of images."""
        return self.num_images

    def inventory(self) -> str:
        """All there is to know."""
        return f"{self.num_images} images of noise"

    def read(self, start: int, stop: int) -> list[int]:
        """Seeds."""
        return list(range(start, stop))

    def samples(self, start: int, items: list[int]) -> Iterator[Sample]:
        """Draws the images."""
        for index, seed in enumerate(items, start):
            pixels = np.random.default_rng(seed).integers(256, size=(3, _SIZE, _SIZE), dtype=np.uint8)
            yield Sample(sample_key(index), torch.from_numpy(pixels), None)


def main(arguments: Arguments) -> None:
    """Measures everything and prints the table."""
    facts = machine()
    location = str(arguments.data.absolute() / f"noise-{arguments.megabytes}")
    source = Noise(num_images=arguments.megabytes * 10**6 // (3 * _SIZE**2))
    prepare(source, PrepareConfig(source=source.name, images_per_shard=500), location)
    results = []
    for processes in arguments.loader_workers:
        for cache in arguments.cache_mib:
            task = {
                "location": location,
                "batch_size": arguments.batch_size,
                "batches": arguments.batches,
                "loader_workers": processes,
                "loader_cache_bytes": cache * MIB,
            }
            results.append(task | {"location": None} | run_child("memory.py", task, pss=True))
    print(markdown(_HEAD, [_row(result) for result in results], facts))
    print(f"The bound of the last row: {results[-1]['formula']}.")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Reads in this process and tells its own peak above the imports, and the stated bound, bytes."""
    torch.set_num_threads(1)
    config = DataConfig(
        data=task["location"],
        batch_size=task["batch_size"],
        loader_workers=task["loader_workers"],
        loader_cache_bytes=task["loader_cache_bytes"],
    )
    gc.collect()
    ready()
    base = own_memory().rss
    reset_peak()
    manifest = load_manifest(config.data)
    order = StreamOrder(
        shard_sizes=manifest.shard_sizes, batch_size=config.batch_size, num_streams=config.num_streams, seed=0
    )
    plan = plan_reading(config, manifest, config.data, num_workers=1)
    with Loader(
        config.data,
        manifest,
        order,
        config,
        rank=0,
        num_workers=1,
        start_step=0,
        end_step=task["batches"],
        finish=lambda batch: batch,
    ) as loader:
        for batch in loader:
            assert batch.x_0.shape == (config.batch_size, 3, _SIZE, _SIZE)
    return {"bound": plan.bound, "formula": plan.formula(), "own_growth": peak_since_reset() - base}


_HEAD = ["loader processes", "decoded images kept, MiB", "stated bound, MiB", "peak of this process, MiB"]
_HEAD += ["peak with loader processes (PSS), MiB"]


def _row(result: dict[str, Any]) -> list[str]:
    sizes = [result["loader_cache_bytes"], result["bound"], result["own_growth"], result["memory_growth"]["pss"]]
    return [str(result["loader_workers"]), *(f"{size / MIB:,.0f}" for size in sizes)]


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        main(tyro.cli(Arguments, description=__doc__))
