"""Ctrl-C and SIGTERM that wait for the end of a transaction.

MLflow writes a database through SQLAlchemy in the calling thread. An exception that a signal raises in the middle of
a commit leaves the transaction open, for as long as somebody holds its traceback; every later write of this process
then fails with "database is locked", also the one that would end the run as KILLED.
"""

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["interrupts_held", "uninterrupted"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delays the handlers of SIGINT, SIGTERM and SIGHUP to the end of the block; a second signal is not delayed.

    Signals reach the main thread only; in another one there is nothing to delay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {sign: handler for sign in _SIGNALS if callable(handler := signal.getsignal(sign))}
    came: list[tuple[int, FrameType | None]] = []

    def hold(sign: int, frame: FrameType | None) -> None:
        came.append((sign, frame))
        if len(came) > 1:  # somebody insists: the database may not answer
            handlers[signal.Signals(sign)](sign, frame)

    for sign in handlers:
        signal.signal(sign, hold)
    try:
        yield
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)
        if len(came) == 1:
            handlers[signal.Signals(came[0][0])](*came[0])


def uninterrupted(client: "MlflowClient") -> "MlflowClient":
    """A client whose calls end before an interrupt is heeded; for databases, whose calls are short."""
    return cast("MlflowClient", _Uninterrupted(client))


class _Uninterrupted:
    def __init__(self, client: "MlflowClient") -> None:
        self._wrapped = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        if not callable(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            with interrupts_held():
                return found(*args, **kwargs)

        return call
