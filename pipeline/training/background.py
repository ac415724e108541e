"""Work beside the driver's main thread that never keeps the process from ending."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from torch import nn

__all__ = ["Background", "StoppedError", "stop_when"]

P = ParamSpec("P")
R = TypeVar("R")


class StoppedError(Exception):
    """The work was stopped because the process ends."""


class Background:
    """One thread that does one call after the other. Unlike an executor's it is not waited for at the process's end."""

    def __init__(self, name: str) -> None:
        """Starts the thread."""
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
        """Queues a call."""
        future: Future[R] = Future()

        def run() -> None:
            try:
                future.set_result(call(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        return future

    def _work(self) -> None:
        while True:
            self._calls.get()()


def stop_when(network: nn.Module, event: threading.Event) -> None:
    """Makes every layer of a network raise ``StoppedError`` once the event is set.

    Python ends a daemon thread when it comes back from native code, and inside torch that aborts the process: sampling
    has to stop by itself.
    """

    def check(_module: nn.Module, _inputs: Any) -> None:
        if event.is_set():
            raise StoppedError

    for module in network.modules():
        module.register_forward_pre_hook(check)
