"""``imagenet:PATTERN``: the npz batches of downsampled ImageNet with labels (Chrabaszcz et al. 2017).

A batch holds ``data``, uint8 [N, 3 S S], rows of a red, a green and a blue plane; ``labels`` from 1 on; and ``mean``,
which is not needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from pipeline.data.manifest import Fit
from pipeline.data.sources.arrays import ArraySource
from pipeline.data.sources.base import FittedSource, Sample, sample_key
from pipeline.data.sources.files import identity
from pipeline.data.sources.forward import Forward
from pipeline.data.sources.labels import number_names
from pipeline.data.sources.names import absolute, expand_files
from pipeline.data.sources.npz import open_npz, stream_rows
from pipeline.errors import UserError

__all__ = ["ImagenetSource", "open_imagenet"]


@dataclass(frozen=True, kw_only=True)
class ImagenetSource(FittedSource):
    """Images of one or more batches, in the order of their names."""

    pattern: str
    batches: tuple[ArraySource, ...]
    class_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """``imagenet:`` and the absolute pattern."""
        return f"imagenet:{self.pattern}"

    @property
    def reads_in_driver(self) -> bool:
        """True if a batch is compressed."""
        return any(batch.reads_in_driver for batch in self.batches)

    def __len__(self) -> int:
        """Number of rows of all batches."""
        return sum(map(len, self.batches))

    def inventory(self) -> str:
        """Name, size, ends and shape of each batch."""
        return "; ".join(f"{batch.location}: {batch.inventory()}" for batch in self.batches)

    def read(self, start: int, stop: int) -> list[Any]:
        """The bytes of each image; UserError if a file is damaged."""
        parts = self._parts(start, stop)
        return [item for batch, begin, end in parts for item in batch.read(begin, end)]

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """The rows as images, with labels from 0 on."""
        at = 0
        for batch, begin, end in self._parts(start, start + len(items)):
            for sample in batch.samples(begin, items[at : at + end - begin]):
                yield Sample(sample_key(start + at), sample.pixels, sample.label)
                at += 1

    def _parts(self, start: int, stop: int) -> Iterator[tuple[ArraySource, int, int]]:
        """Which rows of which batches images ``start .. stop - 1`` are."""
        for batch, last in zip(self.batches, accumulate(map(len, self.batches)), strict=True):
            first = last - len(batch)
            if start < last and stop > first:
                yield batch, max(start - first, 0), min(stop - first, len(batch))


def open_imagenet(pattern: str, *, image_size: int | None, image_channels: int | None, crop: Fit) -> ImagenetSource:
    """Opens the batches; their size and RGB unless told otherwise.

    Raises:
        UserError: No such files, other arrays than the published ones, or batches of different sizes.
    """
    location = absolute(pattern)
    batches: list[ArraySource] = []
    for file in expand_files(location, f"imagenet:{pattern}", ".npz"):
        batch = _open_batch(file, image_size=image_size, image_channels=image_channels or 3, crop=crop)
        if batches and batch.image_size != batches[0].image_size:
            sizes = f"{batches[0].image_size} and {batch.image_size} pixels"
            raise UserError(f"imagenet:{pattern}: batches of {sizes}; give files of one size, or --image-size")
        batches.append(batch)
    names = number_names([label for batch in batches for label in batch.labels])
    return ImagenetSource(
        pattern=location,
        batches=tuple(batches),
        class_names=names,
        image_size=batches[0].image_size,
        image_channels=image_channels or 3,
        crop=crop,
    )


def _open_batch(location: str, *, image_size: int | None, image_channels: int, crop: Fit) -> ArraySource:
    found = open_npz(location, names=("data",), as_planes=True)
    if not found.labels or min(found.labels) < 1:
        what = "no labels" if not found.labels else "a label 0, and they count from 1"
        raise UserError(f"{location} has {what}; give the published batches, or npz:PATH for other arrays")
    return ArraySource(
        kind="npz",
        location=location,
        header=found.header,
        labels=tuple(label - 1 for label in found.labels),
        class_names=(),
        identity=identity(location),
        stream=Forward(partial(stream_rows, location, found.member, as_planes=True)) if found.is_compressed else None,
        image_size=image_size or found.header.native_size(location),
        image_channels=image_channels,
        crop=crop,
    )
