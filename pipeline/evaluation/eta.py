"""How far an evaluation is, now and then, in the log."""

import logging
import time

__all__ = ["Progress"]

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A line with the speed and the time left, now and then."""

    def __init__(self, name: str, wanted: int, *, done: int) -> None:
        """Starts the clock.

        Args:
            name: What is measured, in words.
            wanted: Number of images.
            done: How many of them an earlier evaluation has left.
        """
        self._name, self._wanted, self._before, self._done = name, wanted, done, done
        self._began = time.monotonic()
        self._next_line = self._began + _SECONDS_BETWEEN_LINES

    def add(self, count: int) -> None:
        """Takes note of so many more images."""
        self._done += count
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + _SECONDS_BETWEEN_LINES
        rate = (self._done - self._before) / (now - self._began)
        logger.info(
            "%s: %d/%d images, %.1f images/s, about %.0f s left",
            self._name,
            self._done,
            self._wanted,
            rate,
            (self._wanted - self._done) / rate,
        )
