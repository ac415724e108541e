"""Reading what can only be read from its beginning."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

__all__ = ["Forward"]


class Forward:
    """Items by number from an iterator that goes on where the last call stopped.

    A call for earlier items begins anew, which is slow but right. Copies, as pickle makes them, begin anew too.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        """Remembers how to begin; opens nothing yet.

        Args:
            begin: Picklable; yields all items in order. What it opened it closes when it is left.
        """
        self._begin = begin
        self._items: Iterator[Any] = iter(())
        self._position: int | None = None

    def take(self, start: int, stop: int) -> list[Any]:
        """Items ``start .. stop - 1``, fewer at the end."""
        if self._position is None or start < self._position:
            self._items, self._position = self._begin(), 0
        skipped, self._position = start - self._position, None
        # The position stays unknown if reading fails: the next call then begins anew.
        taken = list(islice(self._items, skipped, skipped + stop - start))
        self._position = stop
        return taken

    def __reduce__(self) -> tuple[Any, ...]:
        """An open file does not travel."""
        return Forward, (self._begin,)
