"""What a source is: images by number, read cheaply in one place and decoded in another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.data.manifest import Fit
from pipeline.data.sources.pixels import decode_image, fit_image

__all__ = ["FittedSource", "Sample", "Source", "sample_key"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a source.

    Attributes:
        key: Name that is unique in the data set; no dots, since WebDataset splits a member's name at the first one.
        pixels: uint8 [C, H, W], H = W = the source's ``image_size``.
        label: Index into the source's ``class_names``; None in a source without classes.
    """

    key: str
    pixels: Tensor
    label: int | None


class Source(Protocol):
    """Images by number. Picklable, so that Ray tasks get a copy; caches and open files stay behind."""

    @property
    def name(self) -> str:
        """What the images are, in words that ``open_source`` understands."""

    @property
    def image_size(self) -> int:
        """Height and width of every image, in pixels."""

    @property
    def image_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; empty when the images have no labels."""

    @property
    def reads_in_driver(self) -> bool:
        """Whether the source can only be read from its beginning, as a compressed tar.

        The driver then reads in ascending order and sends the items to the tasks; it may leave gaps. Else every task
        reads its own share, in any order.
        """

    def __len__(self) -> int:
        """Number of images."""

    def inventory(self) -> str:
        """Text that changes when the content does: names, sizes, checksums that storage knows; no pixels are read."""

    def read(self, start: int, stop: int) -> list[Any]:
        """Images ``start .. stop - 1`` as they are stored (encoded files, arrays): picklable, not decoded.

        Raises:
            UserError: The content is not what it claims to be.
            WorldError: It was there when the source was opened and cannot be read now.
        """

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """Decodes, crops and resizes the items that ``read(start, ...)`` gave.

        Raises:
            UserError: An item is not an image that can be read.
        """


def sample_key(index: int) -> str:
    """The key of a source's image ``index``."""
    return f"{index:09d}"


@dataclass(frozen=True, kw_only=True)
class FittedSource:
    """The half that all sources share: what every image is brought to."""

    image_size: int
    image_channels: int
    crop: Fit = "center"

    def fit_file(self, index: int, data: bytes, label: int | None, name: str) -> Sample:
        """Decodes an image file; UserError with ``name`` if it is none."""
        pixels = decode_image(data, name, self.image_size, self.image_channels, self.crop)
        return Sample(sample_key(index), pixels, label)

    def fit_array(self, index: int, array: np.ndarray, label: int | None) -> Sample:
        """Fits pixels, uint8 [H, W] or [H, W, 3]."""
        pixels = fit_image(Image.fromarray(array), self.image_size, self.image_channels, self.crop)
        return Sample(sample_key(index), pixels, label)
