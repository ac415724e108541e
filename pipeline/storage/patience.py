"""Waiting for storage, or another server, that is down."""

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from pipeline.errors import WorldError

__all__ = ["UnreachableError", "patiently"]

logger = logging.getLogger(__name__)

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 5.0
_SECONDS_BETWEEN_WARNINGS = 30.0

Answer = TypeVar("Answer")


class UnreachableError(WorldError):
    """A server did not answer, broke off or said that it cannot serve now: the same request may succeed later."""


def patiently(location: str, patience_seconds: float, ask: Callable[[], Answer], *, server: str = "storage") -> Answer:
    """What ``ask`` returns, asked again with growing pauses while storage is unreachable.

    Time counts from the first failure. One try takes as long as the S3 client's own time-outs and retries let it, so
    that the last may end after the patience does.

    Args:
        location: What is asked for, for the log.
        patience_seconds: How long to go on; 0 asks once.
        ask: A request that may be repeated.
        server: Who is asked, for the log.

    Raises:
        UnreachableError: Storage is still unreachable after ``patience_seconds``.
    """
    outage: _Outage | None = None
    while True:
        try:
            answer = ask()
        except UnreachableError as error:
            if patience_seconds <= 0:
                raise
            outage = outage or _Outage(location, patience_seconds, server)
            outage.pause(error)
        else:
            if outage:
                outage.end()
            return answer


class _Outage:
    """One stretch of time in which a server is unreachable."""

    def __init__(self, location: str, patience_seconds: float, server: str) -> None:
        self._location, self._server = location, server
        self._patience_seconds = patience_seconds
        self._since = datetime.now().astimezone()
        self._start = time.monotonic()
        self._next_warning = self._start
        self._delay = _FIRST_DELAY_SECONDS

    def pause(self, error: UnreachableError) -> None:
        """Sleeps before the next try, or raises the error when the patience is over."""
        now = time.monotonic()
        waited = now - self._start
        remaining = self._patience_seconds - waited
        if remaining <= 0:
            raise UnreachableError(f"{error}; gave up after waiting {waited:.0f} s") from error
        if now >= self._next_warning:
            logger.warning(
                "%s is unreachable since %s: %s; waiting up to %.0f s more",
                self._server,
                self._since.isoformat(sep=" ", timespec="seconds"),
                error,
                remaining,
            )
            self._next_warning = now + _SECONDS_BETWEEN_WARNINGS
        time.sleep(min(self._delay, remaining))
        self._delay = min(2 * self._delay, _LONGEST_DELAY_SECONDS)

    def end(self) -> None:
        """Says that the server is back."""
        logger.info("%s is back after %.1f s: %s", self._server, time.monotonic() - self._start, self._location)
