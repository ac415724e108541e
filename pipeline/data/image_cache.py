"""Decoded images, kept in memory."""

import math

import numpy as np

__all__ = ["IMAGE_OVERHEAD_BYTES", "ImageCache"]

IMAGE_OVERHEAD_BYTES = 130
"""Memory of the dictionary's entry beside a cached image."""


class ImageCache:
    """Decoded images, kept until the budget is full and then for good: a small data set is decoded once.

    Nothing is dropped for something newer: every epoch is a fresh permutation, so what was read last is no likelier to
    come next, and a data set that does not fit still gets a hit for every image that is held.
    """

    def __init__(self, shape: tuple[int, int, int], num_images: int, budget_bytes: int) -> None:
        """Takes no memory yet."""
        capacity = min(num_images, budget_bytes // (math.prod(shape) + IMAGE_OVERHEAD_BYTES))
        # The system gives memory to the array row by row, as it is written.
        self._pixels = np.empty((capacity, *shape), dtype=np.uint8)
        self._rows: dict[int, int] = {}

    def copy_to(self, numbers: np.ndarray, out: np.ndarray) -> list[bool]:
        """Copies the images that are held to their places; tells which."""
        rows = self._rows_of(numbers)
        held = rows >= 0
        out[held] = self._pixels[rows[held]]
        return [bool(each) for each in held]

    def holds(self, numbers: np.ndarray) -> list[bool]:
        """Which images are held."""
        return [row >= 0 for row in self._rows_of(numbers).tolist()]

    def _rows_of(self, numbers: np.ndarray) -> np.ndarray:
        return np.array([self._rows.get(number, -1) for number in numbers.tolist()], dtype=np.int64)

    def offer(self, number: int, pixels: np.ndarray) -> None:
        """Keeps an image if there is room."""
        row = len(self._rows)
        if row < len(self._pixels) and number not in self._rows:
            self._pixels[row] = pixels
            self._rows[number] = row
