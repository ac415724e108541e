"""``digits``: real handwritten digits without a download."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.data.sources.base import FittedSource, Sample

__all__ = ["DigitsSource"]


@dataclass(frozen=True, kw_only=True)
class DigitsSource(FittedSource):
    """Handwritten digits of the UCI test set as scikit-learn ships them: 1,797 grey images of 8x8, labels 0-9."""

    image_size: int = 8
    image_channels: int = 1
    name: str = "digits"
    class_names: tuple[str, ...] = tuple("0123456789")
    reads_in_driver: bool = False

    def __len__(self) -> int:
        """1,797."""
        return len(_digits()[1])

    def inventory(self) -> str:
        """The digits are part of scikit-learn and do not change."""
        return f"{len(self)} digits"

    def read(self, start: int, stop: int) -> list[Any]:
        """Arrays uint8 [8, 8]."""
        return list(_digits()[0][start:stop])

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """The digits as images, each with its digit as label."""
        labels = _digits()[1]
        for index, item in enumerate(items, start):
            yield self.fit_array(index, item, int(labels[index]))


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.rint(bunch.images * 255 / 16).astype(np.uint8), bunch.target
