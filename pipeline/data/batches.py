"""The batch of a step, read from shards: a plain function of the step, with caches behind it. No threads here."""

import struct
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.data.order import Position, StreamOrder, streams_of_rank
from pipeline.data.shards import EncodedSample, Manifest, read_shard
from pipeline.draws import Purpose, generator
from pipeline.errors import WorldError
from pipeline.images import decode_image, to_model_range

__all__ = ["Batch", "BatchReader"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One worker's part of a global batch: b = B / num_workers images, ordered by stream.

    Attributes:
        step: Global step that the batch belongs to, from 0.
        x_0: Images, float32 [b, C, H, W], in [-1, 1].
        labels: Class indices, int64 [b]; None in a data set without classes.
        keys: Keys of the images in the data set, b of them.
        streams: The worker's canonical streams, each with b / len(streams) consecutive images.
    """

    step: int
    x_0: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]
    streams: tuple[int, ...]


class BatchReader:
    """Reads one worker's part of any step.

    Args:
        location: The data set's folder.
        manifest: Its manifest.
        order: The canonical order over the manifest's shards.
        rank: This worker.
        num_workers: All workers; must divide ``order.num_streams``.
        random_flip: Mirror images left to right with probability 1/2, drawn for (seed, step, stream).
        cache_bytes: Budget for encoded shards, and once more the same budget for decoded images.

    Raises:
        UserError: ``num_workers`` does not divide the number of streams.
    """

    def __init__(
        self,
        location: str,
        manifest: Manifest,
        order: StreamOrder,
        *,
        rank: int,
        num_workers: int,
        random_flip: bool,
        cache_bytes: int,
    ) -> None:
        """Reads nothing yet."""
        assert order.shard_sizes == manifest.shard_sizes, "the order was made for another data set"
        self.streams = streams_of_rank(order.num_streams, rank, num_workers)
        self._manifest = manifest
        # A copy with caches of its own: this one is used in the loader's thread.
        self._order = replace(order)
        self._random_flip = random_flip
        self._shards = _ShardCache(location, manifest, cache_bytes)
        self._images = _ImageCache(cache_bytes)

    def read(self, step: int) -> Batch:
        """The batch of one step.

        Raises:
            WorldError: A shard is missing or damaged, or an image in it is not what the manifest says.
        """
        positions = [each for stream in self.streams for each in self._order.stream_positions(step, stream)]
        self._shards.needed = {shard for shard, _ in positions}
        images = [self._image(position) for position in positions]
        pixels = np.stack([image.pixels for image in images])
        if self._random_flip:
            mirrored = self._flips(step)
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        labels = torch.tensor([image.label for image in images]) if self._manifest.class_names else None
        keys = tuple(image.key for image in images)
        return Batch(step, to_model_range(torch.from_numpy(pixels)), labels, keys, tuple(self.streams))

    def _flips(self, step: int) -> np.ndarray:
        # The top bit of raw words: fixed by the definition of Philox, whatever numpy does on top of it.
        count, seed = self._order.images_per_stream, self._order.seed
        words = [generator(seed, Purpose.FLIP, step, stream).bit_generator.random_raw(count) for stream in self.streams]
        return np.asarray(np.concatenate(words) >> np.uint64(63), dtype=bool)

    def _image(self, position: Position) -> "_Image":
        image = self._images.get(position)
        if image is None:
            shard, index = position
            sample = self._shards.get(shard)[index]
            image = _decode(sample, self._manifest, self._manifest.shards[shard].name)
            self._images.offer(position, image)
        return image


@dataclass(frozen=True, eq=False)
class _Image:
    key: str
    pixels: np.ndarray
    label: int


class _ShardCache:
    """Encoded shards, the least recently used dropped first. The shards of the present batch always stay.

    They must: with a budget below one shard a stream, every step would read all of its shards again.
    """

    def __init__(self, location: str, manifest: Manifest, budget_bytes: int) -> None:
        self.needed: set[int] = set()
        self._location, self._manifest, self._budget_bytes = location, manifest, budget_bytes
        self._held: dict[int, list[EncodedSample]] = {}  # in order of use

    def get(self, shard: int) -> list[EncodedSample]:
        samples = self._held.pop(shard, None)
        if samples is None:
            self._make_room(self._manifest.shards[shard].num_bytes)
            samples = read_shard(self._location, self._manifest.shards[shard])
        self._held[shard] = samples
        return samples

    def _make_room(self, num_bytes: int) -> None:
        total = num_bytes + sum(self._manifest.shards[shard].num_bytes for shard in self._held)
        for shard in [shard for shard in self._held if shard not in self.needed]:
            if total <= self._budget_bytes:
                return
            del self._held[shard]
            total -= self._manifest.shards[shard].num_bytes


class _ImageCache:
    """Decoded images, kept until the budget is full and then for good: a small data set is decoded once.

    Nothing is dropped for something newer: every epoch is a fresh permutation, so what was read last is no likelier to
    come next, and a data set that does not fit still gets a hit for every image that is held.
    """

    OVERHEAD_BYTES = 400  # the Python objects around the pixels, measured roughly; they outweigh an 8x8 image

    def __init__(self, budget_bytes: int) -> None:
        self._free_bytes = budget_bytes
        self._held: dict[Position, _Image] = {}

    def get(self, position: Position) -> _Image | None:
        return self._held.get(position)

    def offer(self, position: Position, image: _Image) -> None:
        num_bytes = image.pixels.nbytes + self.OVERHEAD_BYTES
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._held[position] = image


def _decode(sample: EncodedSample, manifest: Manifest, shard: str) -> _Image:
    try:
        stored = _png_shape(sample.image)
        pixels = decode_image(sample.image, manifest.image_channels)
    except ValueError as error:
        raise WorldError(f"shard {shard}, image {sample.key}: {error}; prepare the data again") from error
    expected = (manifest.image_channels, manifest.image_size, manifest.image_size)
    if stored != expected:
        raise WorldError(f"shard {shard}, image {sample.key}: expected [C, H, W] = {expected}, found {stored}")
    if manifest.class_names and (sample.label is None or not 0 <= sample.label < len(manifest.class_names)):
        allowed = f"0..{len(manifest.class_names) - 1}"
        raise WorldError(f"shard {shard}, image {sample.key}: label {sample.label} is not in {allowed}")
    return _Image(sample.key, pixels, -1 if sample.label is None else sample.label)


def _png_shape(data: bytes) -> tuple[int, int, int]:
    """[C, H, W] as stored. From the header, since decoding converts to the channels asked for without a word."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        raise ValueError("not a PNG image")
    width, height, depth, colour_type = struct.unpack(">IIBB", data[16:26])
    if depth != 8:
        raise ValueError(f"{depth} bits a channel instead of 8")
    channels = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(colour_type, 0)
    return channels, height, width
