"""Small data sets for tests: random images, so that each is told apart from every other, and ways to damage them."""

import io
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.batches import Batch, BatchReader, join
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest, ShardIndex, index_name, shard_name
from pipeline.data.order import Position, StreamOrder
from pipeline.data.prepare import Finished, write_manifest
from pipeline.data.shards import encode_shard, index_shard
from pipeline.data.sources import Sample
from pipeline.images import encode_image

SIZES = (5, 7, 1, 11)


@dataclass(frozen=True)
class DataSet:
    """A data set on disk and what was put into it."""

    location: str
    manifest: Manifest
    samples: dict[Position, Sample]

    def path(self, shard: int) -> Path:
        return Path(self.location) / self.manifest.shards[shard].name

    def index(self, shard: int) -> ShardIndex:
        return ShardIndex.from_json((Path(self.location) / self.manifest.shards[shard].index).read_bytes())

    def place(self, shard: int, image: int) -> tuple[str, int]:
        """Key and byte offset of an image."""
        index = self.index(shard)
        return index.keys[image], int(index.offsets[image])

    def flip_a_byte(self, shard: int, image: int) -> None:
        """In the middle of an image file."""
        index = self.index(shard)
        flip_a_byte(self.path(shard), int(index.offsets[image]) + int(index.sizes[image]) // 2)

    def truncate(self, shard: int, image: int) -> None:
        """Cuts a shard off in the middle of an image file."""
        index = self.index(shard)
        os.truncate(self.path(shard), int(index.offsets[image]) + int(index.sizes[image]) // 2)


def flip_a_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def random_samples(
    count: int, *, channels: int = 3, size: int = 4, labelled: bool = True, prefix: str = "", seed: int = 0
) -> list[Sample]:
    values = np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return [
        Sample(f"{prefix}{i:06d}", torch.from_numpy(values[i]), (seed + i) % 3 if labelled else None)
        for i in range(count)
    ]


def tar_of(samples: Iterable[Mapping[str, Any]]) -> bytes:
    """A shard as somebody else's program would write it; ``samples`` are members by extension."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return buffer.getvalue()


def write_data_set(
    folder: Path,
    sizes: tuple[int, ...] = SIZES,
    *,
    channels: int = 3,
    size: int = 4,
    labelled: bool = True,
    image_format: str = "png",
    files: Mapping[Position, bytes] | None = None,
) -> DataSet:
    """Writes shards, indexes and manifest; ``files`` are image files to put in place of the right ones."""
    finished, written = [], {}
    for shard, count in enumerate(sizes):
        samples = random_samples(
            count, channels=channels, size=size, labelled=labelled, prefix=f"{shard:03d}", seed=shard
        )
        written |= {(shard, i): sample for i, sample in enumerate(samples)}
        if files is None:
            data = encode_shard(samples, image_format)
        else:
            data = tar_of(
                {
                    "__key__": sample.key,
                    "png": files.get((shard, i)) or encode_image(sample.pixels, "png"),
                    "cls": str(sample.label).encode(),
                }
                for i, sample in enumerate(samples)
            )
        finished.append(write_shard(folder, shard, data))
    manifest = write_manifest(
        str(folder),
        finished,
        source="random",
        source_fingerprint="0",
        image_size=size,
        image_channels=channels,
        class_names=("a", "b", "c") if labelled else (),
        image_format=image_format,
    )
    return DataSet(str(folder), manifest, written)


def write_shard(folder: Path, number: int, data: bytes) -> Finished:
    index = index_shard(shard_name(number), io.BytesIO(data))
    (folder / "index").mkdir(parents=True, exist_ok=True)
    (folder / shard_name(number)).write_bytes(data)
    (folder / index_name(number)).write_bytes(index.to_json())
    return Finished(number, shard_name(number), index, written=True)


def order_of(manifest: Manifest, config: DataConfig, seed: int = 11) -> StreamOrder:
    return StreamOrder(
        shard_sizes=manifest.shard_sizes, batch_size=config.batch_size, num_streams=config.num_streams, seed=seed
    )


def config_of(**knobs: Any) -> DataConfig:
    return DataConfig(**{"batch_size": 8, "num_streams": 4, "loader_cache_bytes": 2**20, **knobs})


def reader_of(data_set: Any, *, rank: int = 0, num_workers: int = 1, **knobs: Any) -> BatchReader:
    """A reader of a ``DataSet`` or ``PrepareResult``; ``knobs`` are of ``DataConfig``."""
    config = config_of(**knobs)
    order = order_of(data_set.manifest, config)
    return BatchReader(data_set.location, data_set.manifest, order, config, rank=rank, num_workers=num_workers)


def read_batch(reader: BatchReader, step: int) -> Batch:
    return join(step, reader.streams, [reader.read(step)], True)


def loader_of(
    data_set: Any, steps: range, *, rank: int = 0, num_workers: int = 1, order: StreamOrder | None = None, **knobs: Any
) -> "Loader[Batch]":
    """A loader of a ``DataSet`` or ``PrepareResult``; ``knobs`` are of ``DataConfig``."""
    config = config_of(**knobs)
    return Loader(
        data_set.location,
        data_set.manifest,
        order or order_of(data_set.manifest, config),
        config,
        rank=rank,
        num_workers=num_workers,
        start_step=steps.start,
        end_step=steps.stop,
        finish=_unchanged,
    )


def _unchanged(batch: Batch) -> Batch:
    return batch


def picture(mode: str, size: tuple[int, int], image_format: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    """An image file of random pixels; ``size`` is (width, height)."""
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def deep_png() -> bytes:
    """16 bits a channel, grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


def huge_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A few bytes that claim to be gigabytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
