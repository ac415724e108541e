"""Who reads what, when: the canonical order of images, independent of the number of workers.

The global batch of B images is filled from S canonical streams. For every epoch the shards are permuted, the images
inside each shard are permuted, and the resulting sequence is cut into S ranges of equal length; stream s reads its
range in order, B / S images a step. A worker owns a contiguous block of streams, so 1, 2 or 4 workers train on the same
batches. A position is computed from the step, never advanced to: resume costs the same at step 1 and 1,000,000.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from pipeline.draws import Purpose, generator, permutation
from pipeline.errors import UserError

__all__ = ["Position", "StreamOrder", "streams_of_rank"]

Position = tuple[int, int]
"""(shard, index): which shard, and which image of it in the order written."""


def streams_of_rank(num_streams: int, rank: int, num_workers: int) -> range:
    """The streams of one worker: a contiguous block, so that concatenating the ranks gives the canonical batch.

    With a number of workers that does not divide the streams, some own one stream more than others.

    Args:
        num_streams: S, canonical streams of the run.
        rank: This worker, in [0, num_workers).
        num_workers: Workers that train now; may differ from one resume to the next.

    Raises:
        UserError: There are more workers than streams.
    """
    if not 1 <= num_workers <= num_streams:
        raise UserError(f"--num-workers {num_workers}: the batch has {num_streams} streams; give 1 to {num_streams}")
    assert 0 <= rank < num_workers, f"rank {rank} of {num_workers} workers"
    return range(rank * num_streams // num_workers, (rank + 1) * num_streams // num_workers)


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """The images of every global batch as a pure function of the step.

    Every epoch delivers ``images_per_epoch`` distinct images. The remainder (fewer than a batch) is left out, and since
    every epoch permutes anew, another remainder every time.

    Attributes:
        shard_sizes: Number of images in each shard, each at least 1.
        batch_size: B, images in a global batch.
        num_streams: S, canonical streams; divides B.
        seed: The run's seed.

    Raises:
        UserError: ``num_streams`` does not divide ``batch_size``, or the data set is smaller than a batch.
    """

    shard_sizes: tuple[int, ...]
    batch_size: int
    num_streams: int
    seed: int
    _epochs: "dict[int, _Epoch]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks the numbers."""
        assert all(size > 0 for size in self.shard_sizes), "a shard holds at least one image"
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: give at least 1")
        if self.num_streams < 1 or self.batch_size % self.num_streams:
            raise UserError(
                f"--num-streams {self.num_streams} does not divide --batch-size {self.batch_size}; "
                "give a divisor of the batch size"
            )
        if self.num_images < self.batch_size:
            raise UserError(
                f"data set has {self.num_images} images, fewer than --batch-size {self.batch_size}; "
                "give a smaller batch size or more images"
            )

    @cached_property
    def num_images(self) -> int:
        """N, images in the data set."""
        return sum(self.shard_sizes)

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_images // self.batch_size

    @property
    def images_per_epoch(self) -> int:
        """Images that an epoch delivers: the largest multiple of the batch size."""
        return self.batches_per_epoch * self.batch_size

    @property
    def remainder(self) -> int:
        """Images that an epoch leaves out, in [0, batch_size)."""
        return self.num_images - self.images_per_epoch

    @property
    def images_per_stream(self) -> int:
        """B / S, images that a stream gives to a global batch."""
        return self.batch_size // self.num_streams

    def locate(self, step: int, streams: range) -> tuple[np.ndarray, np.ndarray]:
        """The images of some streams in the global batch of one step.

        Args:
            step: Global step, from 0; its epoch is ``step // batches_per_epoch``.
            streams: Streams, each in [0, num_streams).

        Returns:
            Shards and indices in them, each int64 [len(streams) * images_per_stream], ordered by stream.
        """
        epoch, positions = self._positions(step, streams)
        return self._epoch(epoch).locate(positions)

    def shards(self, step: int, streams: range) -> np.ndarray:
        """The shards that ``locate`` gives, without working out which images."""
        epoch, positions = self._positions(step, streams)
        return self._epoch(epoch).shards(positions)

    def global_batch(self, step: int) -> list[Position]:
        """All ``batch_size`` images of one step, streams in order."""
        shards, indices = self.locate(step, range(self.num_streams))
        return list(zip(shards.tolist(), indices.tolist(), strict=True))

    def substitute(self, step: int, stream: int, slot: int, attempt: int) -> Position:
        """An image to take in place of one that cannot be read: any of the data set, drawn for this place alone.

        Args:
            step: Global step.
            stream: The stream whose image is damaged.
            slot: Which of the stream's images of this step, from 0.
            attempt: From 0; counts substitutes for this place that were damaged as well.
        """
        words = generator(self.seed, Purpose.SUBSTITUTE, step, stream, slot).bit_generator.random_raw(attempt + 1)
        number = int(words[-1] % np.uint64(self.num_images))
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(np.asarray(self.shard_sizes, dtype=np.int64))

    def _positions(self, step: int, streams: range) -> tuple[int, np.ndarray]:
        """The epoch, and positions in its sequence."""
        assert step >= 0, f"step {step}"
        assert 0 <= streams.start < streams.stop <= self.num_streams, f"{streams} of {self.num_streams} streams"
        epoch, batch = divmod(step, self.batches_per_epoch)
        images_per_range = self.images_per_epoch // self.num_streams
        starts = np.arange(streams.start, streams.stop) * images_per_range + batch * self.images_per_stream
        return epoch, (starts[:, None] + np.arange(self.images_per_stream)).ravel()

    def _epoch(self, epoch: int) -> "_Epoch":
        found = self._epochs.get(epoch)
        if found is None:
            found = _Epoch(self.shard_sizes, self.seed, epoch, num_cached=4 * self.num_streams)
            # Two epochs suffice: a reader stands in one, or crosses into the next.
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = found
        return found


class _Epoch:
    """The sequence of one epoch; a shard's permutation is computed when a stream enters the shard."""

    def __init__(self, shard_sizes: tuple[int, ...], seed: int, epoch: int, *, num_cached: int) -> None:
        self._shard_sizes, self._seed, self._epoch, self._num_cached = shard_sizes, seed, epoch, num_cached
        self._shard_order = permutation(len(shard_sizes), seed, Purpose.SHARD_ORDER, epoch)
        self._ends = np.cumsum(np.asarray(shard_sizes, dtype=np.int64)[self._shard_order])
        self._image_orders: dict[int, np.ndarray] = {}

    def shards(self, positions: np.ndarray) -> np.ndarray:
        """The shards of positions in the epoch's sequence, int64 [n]."""
        return self._shard_order[np.searchsorted(self._ends, positions, side="right")]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the epoch's sequence, int64 [n], as shards and indices in them, each int64 [n]."""
        places = np.searchsorted(self._ends, positions, side="right")
        shards = self._shard_order[places]
        # Offset from the shard's end: a negative index into its permutation, and no second table of starts.
        from_end = positions - self._ends[places]
        indices = np.empty_like(positions)
        # Positions ascend, so the images of a shard lie together.
        cuts = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), len(places)]
        for start, stop in pairwise(cuts):
            indices[start:stop] = self._image_order(int(shards[start]))[from_end[start:stop]]
        return shards, indices

    def _image_order(self, shard: int) -> np.ndarray:
        found = self._image_orders.get(shard)
        if found is None:
            found = permutation(self._shard_sizes[shard], self._seed, Purpose.IMAGE_ORDER, self._epoch, shard)
            # Streams only move forward, so the shard entered first is the one that is done with first.
            while len(self._image_orders) >= self._num_cached:
                self._image_orders.pop(next(iter(self._image_orders)), None)
            self._image_orders[shard] = found
        return found
