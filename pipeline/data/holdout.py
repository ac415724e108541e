"""Part of a source: for a data set whose images another data set must not contain."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.sources import Sample, Source
from pipeline.draws import Purpose, permutation
from pipeline.errors import UserError

__all__ = ["SelectedSource", "split"]


@dataclass(frozen=True, eq=False)
class SelectedSource:
    """Some images of another source, under the keys that they have there."""

    whole: Source
    indices: np.ndarray
    """Which images, ascending, int64 [n]."""
    words: str
    """Which images, for a reader."""

    @property
    def name(self) -> str:
        """The whole source and the part."""
        return f"{self.whole.name} ({self.words})"

    @property
    def image_size(self) -> int:
        """As the whole."""
        return self.whole.image_size

    @property
    def image_channels(self) -> int:
        """As the whole."""
        return self.whole.image_channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the whole."""
        return self.whole.class_names

    @property
    def reads_in_driver(self) -> bool:
        """As the whole."""
        return self.whole.reads_in_driver

    def __len__(self) -> int:
        """Number of images of the part."""
        return len(self.indices)

    def inventory(self) -> str:
        """The whole inventory and the part."""
        return f"{self.words} {self.whole.inventory()}"

    def read(self, start: int, stop: int) -> list[Any]:
        """Reads runs of neighbours together."""
        chosen = self.indices[start:stop]
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        return [item for run in runs if len(run) for item in self.whole.read(int(run[0]), int(run[-1]) + 1)]

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """As the whole source decodes them."""
        for index, item in zip(self.indices[start : start + len(items)].tolist(), items, strict=True):
            yield from self.whole.samples(index, [item])


def split(source: Source, fraction: float) -> tuple[SelectedSource, SelectedSource]:
    """Cuts a source in two by a fixed random permutation: (the rest, ``fraction`` of the images).

    Raises:
        UserError: One of the two would be empty.
    """
    count = round(fraction * len(source))
    if not 0 < count < len(source):
        raise UserError(
            f"--holdout-fraction {fraction} of {len(source)} images leaves one of the two data sets empty; "
            "give another fraction"
        )
    order = permutation(len(source), 0, Purpose.HOLDOUT)
    words = f"{fraction:g} of the images"
    return (
        SelectedSource(source, np.sort(order[count:]), f"without {words}"),
        SelectedSource(source, np.sort(order[:count]), f"{words} held out"),
    )
