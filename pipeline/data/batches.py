"""The batch of a step, read from shards: a plain function of the step, with caches behind it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.disk_cache import DiskCache
from pipeline.data.faults import DataError, TooMuchDamageError
from pipeline.data.image_cache import ImageCache
from pipeline.data.manifest import Manifest
from pipeline.data.order import Position, StreamOrder, streams_of_rank
from pipeline.data.read_plan import AHEAD_STEPS, AHEAD_STEPS_OF_IMAGES, plan_reading
from pipeline.data.shards import decode_sample
from pipeline.data.store import OpenShard, ShardStore
from pipeline.data.threads import Threads
from pipeline.draws import Purpose, generator
from pipeline.errors import WorldError
from pipeline.images import to_model_range

__all__ = ["Batch", "BatchReader", "Part", "join"]

logger = logging.getLogger(__name__)

_MAX_SUBSTITUTES = 100


@dataclass(frozen=True, eq=False)
class Batch:
    """One worker's part of a global batch: b = B / num_workers images, ordered by stream.

    Attributes:
        step: Global step that the batch belongs to, from 0.
        x_0: Images, float32 [b, C, H, W], in [-1, 1], channels last in memory.
        labels: Class indices, int64 [b]; None in a data set without classes.
        keys: Keys of the images in the data set, b of them.
        streams: The worker's canonical streams, each with b / len(streams) consecutive images.
        bad: What was damaged, a line each; in their places stand substitutes.
    """

    step: int
    x_0: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]
    streams: tuple[int, ...]
    bad: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """Some consecutive images of a worker's batch, as one reader gives them.

    Arrays and no tensors: these cross from one process to another as bytes in a pipe, where every tensor would take a
    handshake over a socket that lasts longer than decoding 32 small images.

    Attributes:
        pixels: uint8 [n, H, W, C].
        labels: int64 [n]; -1 for none.
        keys: n keys.
        bad: As in ``Batch``.
    """

    pixels: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    bad: tuple[str, ...]


def join(step: int, streams: Sequence[int], parts: Sequence[Part], labelled: bool) -> Batch:
    """Puts the parts of a worker's batch together, in order."""
    pixels = parts[0].pixels if len(parts) == 1 else np.concatenate([part.pixels for part in parts])
    return Batch(
        step=step,
        x_0=to_model_range(torch.from_numpy(pixels)).permute(0, 3, 1, 2),
        labels=torch.from_numpy(np.concatenate([part.labels for part in parts])) if labelled else None,
        keys=tuple(key for part in parts for key in part.keys),
        streams=tuple(streams),
        bad=tuple(line for part in parts for line in part.bad),
    )


class BatchReader:
    """Reads one worker's batch of any step, or one part of it where several processes share the work.

    Args:
        location: The data set's folder.
        manifest: Its manifest.
        order: The canonical order over the manifest's shards.
        config: How to read.
        rank: This worker.
        num_workers: All workers; at most ``order.num_streams``.
        part: Which part of the batch this reader reads, and of how many.
        threads: Threads that decode, the caller's included.

    Raises:
        UserError: there are more workers than streams; the disk cache cannot be used.
    """

    def __init__(
        self,
        location: str,
        manifest: Manifest,
        order: StreamOrder,
        config: DataConfig,
        *,
        rank: int,
        num_workers: int,
        part: tuple[int, int] = (0, 1),
        threads: int = 1,
    ) -> None:
        """Reads nothing yet."""
        assert order.shard_sizes == manifest.shard_sizes, "the order was made for another data set"
        self.streams = streams_of_rank(order.num_streams, rank, num_workers)
        self._manifest, self._config = manifest, config
        # A copy with caches of its own: this one is used in another thread or process.
        self._order = replace(order)
        batch = len(self.streams) * order.images_per_stream
        number, count = part
        self._slots = slice(batch * number // count, batch * (number + 1) // count)
        plan = plan_reading(config, manifest, location, num_workers=num_workers)
        self._access = plan.access
        self._store = ShardStore(
            location,
            manifest,
            access=plan.access,
            cache=DiskCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None,
            budget_bytes=plan.shard_bytes // count,
            patience_seconds=config.storage_patience_seconds,
        )
        self._cache = ImageCache(manifest.image_shape, manifest.num_images, plan.cache_bytes // count)
        self._first_images = np.concatenate([[0], np.cumsum(manifest.shard_sizes)[:-1]])
        self._look_again_at = 0
        self._decoders = Threads(threads - 1, "data-decode")
        self._bad_in_epoch: tuple[int, int] = (-1, 0)

    def read(self, step: int) -> Part:
        """This reader's part of the batch of one step.

        Raises:
            DataError: Something is missing or damaged, and that is not to be skipped.
            WorldError: Storage refused or did not answer for too long; too much is damaged.
        """
        shards, images = (places[self._slots] for places in self._order.locate(step, self.streams))
        self._look_ahead(step, shards)
        pixels = np.empty((len(shards), *self._manifest.image_shape), dtype=np.uint8)
        labels = np.empty(len(shards), dtype=np.int64)
        keys: list[str] = [""] * len(shards)
        numbers = self._first_images[shards] + images
        cached = self._cache.copy_to(numbers, pixels)
        bad: dict[int, DataError] = {}
        places: list[_Place] = []
        # Images of one shard lie together in a batch.
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
        for start, stop in pairwise(cuts):
            number = int(shards[start])
            try:
                shard = self._store.shard(number)
            except DataError as fault:
                bad |= dict.fromkeys(range(start, stop), fault)
                continue
            labels[start:stop] = shard.index.labels[images[start:stop]]
            for slot, image in enumerate(images[start:stop].tolist(), start):
                keys[slot] = shard.index.keys[image]
                if not cached[slot]:
                    places.append(_Place(slot, shard, (number, image)))
        bad |= self._fill(places, pixels)
        for place in places:
            if place.slot not in bad:
                self._cache.offer(int(numbers[place.slot]), pixels[place.slot])
        for slot, reason in sorted(bad.items()):
            labels[slot], keys[slot] = self._substitute(step, slot, reason, pixels[slot])
        if self._config.random_flip:
            mirrored = self._flips(step)
            pixels[mirrored] = pixels[mirrored][:, :, ::-1]
        lines = tuple(str(bad[slot]) for slot in sorted(bad))
        return Part(pixels, labels, tuple(keys), lines)

    def close(self) -> None:
        """Ends the threads that read ahead and decode."""
        self._store.close()
        self._decoders.stop()

    def _look_ahead(self, step: int, shards: np.ndarray) -> None:
        needed = dict.fromkeys(shards.tolist())
        if step >= self._look_again_at or not self._store.has_all(needed):
            ahead = (self._order.shards(later, self.streams)[self._slots] for later in range(step, step + AHEAD_STEPS))
            self._store.expect(needed, dict.fromkeys(shard for later in ahead for shard in later.tolist()))
            self._look_again_at = step + AHEAD_STEPS // 2
        if self._access != "ranges":
            return
        ahead_of_time: list[Position] = []
        for later in range(step, step + 1 + AHEAD_STEPS_OF_IMAGES):
            shards, images = (places[self._slots] for places in self._order.locate(later, self.streams))
            held = self._cache.holds(self._first_images[shards] + images)
            places = zip(shards.tolist(), images.tolist(), held, strict=True)
            ahead_of_time += ((shard, image) for shard, image, is_held in places if not is_held)
        self._store.expect_images(ahead_of_time)

    def _fill(self, places: "list[_Place]", pixels: np.ndarray) -> dict[int, DataError]:
        """Reads and decodes images into their places, in several threads; returns the faults by slot."""
        count = 1 + len(self._decoders)
        shares = [places[len(places) * n // count : len(places) * (n + 1) // count] for n in range(count)]
        others = [self._decoders.submit(partial(self._fill_share, share, pixels)) for share in shares[1:] if share]
        faults = self._fill_share(shares[0], pixels)
        for other in others:
            faults |= other.result()
        return faults

    def _fill_share(self, places: "list[_Place]", pixels: np.ndarray) -> dict[int, DataError]:
        faults: dict[int, DataError] = {}
        for place in places:
            try:
                data = self._store.read(place.shard, place.position)
                self._decode(place.shard, place.position[1], data, pixels[place.slot])
            except DataError as fault:
                faults[place.slot] = fault
        return faults

    def _decode(self, shard: OpenShard, image: int, data: bytes, out: np.ndarray) -> None:
        try:
            decode_sample(data, out, self._manifest)
            label, num_classes = int(shard.index.labels[image]), len(self._manifest.class_names)
            if num_classes and not 0 <= label < num_classes:
                raise ValueError(f"label {label} is not in 0..{num_classes - 1}")
        except ValueError as error:
            offset = int(shard.index.offsets[image])
            raise DataError(shard.name, str(error), key=shard.index.keys[image], offset=offset) from error

    def _substitute(self, step: int, slot: int, fault: DataError, out: np.ndarray) -> tuple[int, str]:
        """Fills a place with another image of the data set; which one depends on seed, step and place alone.

        Returns:
            The label and the key of the image.
        """
        if self._config.on_bad_data == "stop":
            raise fault
        self._count_bad(step)
        logger.warning("skipped: %s", fault)
        stream, place = divmod(slot + self._slots.start, self._order.images_per_stream)
        for attempt in range(_MAX_SUBSTITUTES):
            number, image = self._order.substitute(step, self.streams[stream], place, attempt)
            try:
                with self._store.aside(number) as shard:
                    self._decode(shard, image, shard.read(image), out)
                return int(shard.index.labels[image]), shard.index.keys[image]
            except DataError:
                continue
        raise WorldError(f"no readable image found in {_MAX_SUBSTITUTES} tries; the first fault: {fault}")

    def _count_bad(self, step: int) -> None:
        """Stops when this reader alone has met too many; the training loop counts those of all workers."""
        epoch = step // self._order.batches_per_epoch
        self._bad_in_epoch = (epoch, self._bad_in_epoch[1] + 1 if self._bad_in_epoch[0] == epoch else 1)
        allowed = self._config.max_bad_fraction * self._order.images_per_epoch
        if self._bad_in_epoch[1] > allowed:
            raise TooMuchDamageError(self._bad_in_epoch[1], self._order.images_per_epoch, self._config.max_bad_fraction)

    def _flips(self, step: int) -> np.ndarray:
        # The top bit of raw words: fixed by the definition of Philox, whatever numpy does on top of it.
        count, seed = self._order.images_per_stream, self._order.seed
        words = [generator(seed, Purpose.FLIP, step, stream).bit_generator.random_raw(count) for stream in self.streams]
        return np.asarray(np.concatenate(words)[self._slots] >> np.uint64(63), dtype=bool)


class _Place(NamedTuple):
    """An image that is to be decoded, and where it goes in the batch."""

    slot: int
    shard: OpenShard
    position: Position
