"""A few threads that never hold up the end of the process."""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["Threads"]

T = TypeVar("T")
_JOIN_SECONDS = 1.0


class Threads:
    """A few daemon threads, until ``stop`` or until nobody has them.

    Those of ``concurrent.futures`` would hold up the end of the process until storage answers.
    """

    def __init__(self, count: int, name: str) -> None:
        """Starts them."""
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        # Whoever forgets to stop them leaves none behind.
        self.stop = weakref.finalize(self, _end, self._tasks, self._threads)

    def __len__(self) -> int:
        """How many."""
        return len(self._threads)

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """Queues a call; its result, or what it raises, is in the future."""
        assert self.stop.alive, "the threads have ended, nobody would do it"
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(run)
        return future


def _end(tasks: "queue.SimpleQueue[Callable[[], None] | None]", threads: list[threading.Thread]) -> None:
    for _ in threads:
        tasks.put(None)
    # Threads that still run when the interpreter ends are a known cause of crashes at that moment. One that waits for
    # storage is left to itself.
    give_up = time.monotonic() + _JOIN_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=max(0.0, give_up - time.monotonic()))


def _work(tasks: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # it refers to its owner, who could never be freed while this thread waits
