"""How a data set will be read, and the memory that it takes: worked out from the manifest before anything is opened."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.data.image_cache import IMAGE_OVERHEAD_BYTES
from pipeline.data.manifest import Manifest, shard_location
from pipeline.data.store import INDEX_BYTES_PER_IMAGE, Access
from pipeline.errors import UserError

__all__ = ["AHEAD_STEPS", "AHEAD_STEPS_OF_IMAGES", "ReadPlan", "plan_reading"]

AHEAD_STEPS = 64
"""Shards that these many steps will need are opened ahead of time."""
AHEAD_STEPS_OF_IMAGES = 4
"""Images that these many steps after the present one will need are fetched ahead of time, where each is a request."""


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """How one worker will read a data set, and the memory that it takes at most.

    Attributes:
        access: How shards are read; see ``store``.
        shards_at_once: Most shards that a batch touches.
        cache_bytes: Decoded images that are kept.
        shard_bytes: Whole shards, their indexes, and single images on their way.
        batch_bytes: Batches prepared ahead.
        loader_workers: Processes that share the work; 0: a thread.
    """

    access: Access
    shards_at_once: int
    cache_bytes: int
    shard_bytes: int
    batch_bytes: int
    loader_workers: int

    @property
    def bound(self) -> int:
        """Bytes that reading takes at most in a worker, without the interpreters of loader processes."""
        return self.cache_bytes + self.shard_bytes + self.batch_bytes

    def formula(self) -> str:
        """The bound in words."""
        how = {"files": "shards read as files", "memory": "whole shards in memory", "ranges": "an image a request"}
        processes = f" + {self.loader_workers} loader processes of about 200 MiB" if self.loader_workers else ""
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (self.cache_bytes, self.shard_bytes, self.batch_bytes)]
        return (
            f"{sizes[0]} decoded images (at most loader_cache_bytes) + {sizes[1]} shards and indexes "
            f"({how[self.access]}, {self.shards_at_once} at once) + {sizes[2]} batches ahead{processes}"
        )


def plan_reading(config: DataConfig, manifest: Manifest, location: str, *, num_workers: int) -> ReadPlan:
    """Chooses how to read, from the sizes in the manifest alone.

    Raises:
        UserError: The disk cache is too small for the shards that one worker reads at once.
    """
    streams = -(-config.num_streams // num_workers)  # of the worker that has the most
    batch = streams * config.batch_size // config.num_streams
    sizes = manifest.shard_sizes
    at_once = _shards_at_once(sizes, streams, config.batch_size // config.num_streams)
    largest = max(shard.num_bytes for shard in manifest.shards)
    remote = any(storage.is_remote(shard_location(location, shard.name)) for shard in manifest.shards)
    access: Access = "files"
    if remote and not config.cache_dir:
        access = "memory" if at_once * largest <= config.loader_cache_bytes else "ranges"
    if config.cache_dir and config.cache_bytes < at_once * largest:
        raise UserError(
            f"--cache-bytes {config.cache_bytes}: a worker reads {at_once} shards of up to {largest} bytes at once; "
            f"give at least {at_once * largest}, smaller shards, or fewer --num-streams"
        )
    needed = at_once * (max(sizes) * INDEX_BYTES_PER_IMAGE + (largest if access == "memory" else 0))
    shard_bytes = max(needed, config.loader_cache_bytes if access == "memory" else config.loader_cache_bytes // 4)
    all_shards = manifest.num_images * INDEX_BYTES_PER_IMAGE
    all_shards += sum(shard.num_bytes for shard in manifest.shards) if access == "memory" else 0
    images_on_the_way = batch * (1 + AHEAD_STEPS_OF_IMAGES) * manifest.largest_image_bytes if access == "ranges" else 0
    image_bytes = math.prod(manifest.image_shape)
    return ReadPlan(
        access=access,
        shards_at_once=at_once,
        cache_bytes=min(config.loader_cache_bytes, manifest.num_images * (image_bytes + IMAGE_OVERHEAD_BYTES)),
        shard_bytes=min(shard_bytes, all_shards) + images_on_the_way,
        # Prefetched, in the making and in use: float32 and the uint8 that it is made from.
        batch_bytes=batch * image_bytes * (4 + 1) * (config.prefetch_batches + 2),
        loader_workers=config.loader_workers,
    )


def _shards_at_once(sizes: Sequence[int], streams: int, images_per_stream: int) -> int:
    """Most shards that a batch touches: two at the ends of each stream's images, and whole ones between them."""
    ends = np.cumsum(np.sort(np.asarray(sizes)))
    between = int(np.searchsorted(ends, streams * max(0, images_per_stream - 2), side="right"))
    return min(len(sizes), 2 * streams + between)
