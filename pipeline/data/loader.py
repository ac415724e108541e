"""Batches ahead of time: made by background threads, or by processes, while the model trains on the present one."""

import multiprocessing
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.config import DataConfig
from pipeline.data.batches import Batch, BatchReader, Part, join
from pipeline.data.manifest import Manifest
from pipeline.data.order import StreamOrder, streams_of_rank
from pipeline.errors import WorldError, first_line

__all__ = ["Batch", "Loader"]

T = TypeVar("T")
_JOIN_SECONDS = 1.0
_PARTS_AHEAD = 3


class Loader(Iterator[T], Generic[T]):
    """One worker's batches of the steps ``start_step .. end_step - 1``, in order.

    Every rank gives the same number of batches, whatever the sizes of the shards. There is no state to save: a new
    loader with another ``start_step`` goes on where this one stopped, with any number of workers or loader processes.
    ``read_plan.plan_reading`` states the memory that it takes.

    Args:
        location: The data set's folder, local or ``s3://``.
        manifest: Its manifest.
        order: The canonical order over the manifest's shards.
        config: How to read; its ``batch_size`` and ``num_streams`` are the order's.
        rank: This worker, in [0, num_workers).
        num_workers: Workers that train; at most ``order.num_streams``.
        start_step: First step, from 0.
        end_step: One past the last step.
        finish: What else is to be done with each batch ahead of time, in the background thread.

    Raises:
        UserError: there are more workers than streams; the disk cache cannot be used.
        DataError: (while iterating) something is missing or damaged, and that is not to be skipped.
        WorldError: (while iterating) storage refused or did not answer for too long; a loader process died.
    """

    def __init__(
        self,
        location: str,
        manifest: Manifest,
        order: StreamOrder,
        config: DataConfig,
        *,
        rank: int,
        num_workers: int,
        start_step: int,
        end_step: int,
        finish: Callable[[Batch], T],
    ) -> None:
        """Starts to prepare the first batches at once."""
        assert start_step >= 0, f"start_step {start_step}"
        assert (config.batch_size, config.num_streams) == (order.batch_size, order.num_streams)
        streams = streams_of_rank(order.num_streams, rank, num_workers)
        steps = range(start_step, end_step)
        batch_size = len(streams) * order.images_per_stream
        count = min(config.loader_workers, batch_size)
        reader = partial(BatchReader, location, manifest, order, config, rank=rank, num_workers=num_workers)
        parts = _in_processes(reader, count, steps) if count else _in_threads(reader, config.decode_threads, steps)
        labelled = bool(manifest.class_names)
        batches = (finish(join(step, streams, each, labelled)) for step, each in parts)
        self._wait_seconds = 0.0
        self._ahead: _Ahead[T] = _Ahead(batches, config.prefetch_batches)
        # Unlike __del__ it also runs at the exit of the interpreter, before torch is torn down under the thread.
        self._stop = weakref.finalize(self, self._ahead.stop)

    @property
    def wait_seconds(self) -> float:
        """Time that ``next`` has waited for data so far, summed; near 0 when the data keeps up with the model."""
        return self._wait_seconds

    def __iter__(self) -> "Loader[T]":
        """Itself: a loader is read once."""
        return self

    def __next__(self) -> T:
        """The next step's batch; ends after ``end_step - 1`` and after ``close``."""
        if not self._stop.alive:
            raise StopIteration
        started = time.monotonic()
        try:
            return self._ahead.take()
        except BaseException:
            self.close()
            raise
        finally:
            self._wait_seconds += time.monotonic() - started

    def close(self) -> None:
        """Ends the background work. May be called twice; a loader that is dropped or left at exit closes itself."""
        self._stop()

    def __enter__(self) -> "Loader[T]":
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def _in_threads(
    open_reader: Callable[..., BatchReader], threads: int, steps: range
) -> Iterator[tuple[int, list[Part]]]:
    with closing(open_reader(threads=threads)) as reader:
        for step in steps:
            yield step, [reader.read(step)]


def _in_processes(
    open_reader: Callable[..., BatchReader], count: int, steps: range
) -> Iterator[tuple[int, list[Part]]]:
    """Process n of N reads part n of every batch, so that a shard is opened and an image is kept in one of them."""
    # Clean processes: a fork would copy the locks of whatever threads the worker has at this moment.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.batches"])
    loader: DataLoader[Any] = DataLoader(
        _Parts(open_reader, count),
        batch_size=None,
        sampler=_StepsAndParts(steps, count),
        collate_fn=_as_it_is,
        num_workers=count,
        prefetch_factor=_PARTS_AHEAD,
        multiprocessing_context=context,
        worker_init_fn=_settle,
    )
    results = iter(loader)
    try:
        for step in steps:
            parts = [_next_part(results) for _ in range(count)]
            for part in parts:
                if isinstance(part, BaseException):
                    raise part
            yield step, parts
    finally:
        # Else they live as long as a traceback that mentions them.
        results._shutdown_workers()  # type: ignore[attr-defined]


def _next_part(results: Iterator[Any]) -> Any:
    try:
        return next(results)
    except (RuntimeError, EOFError, OSError) as error:  # as DataLoader notices it: by a signal, a pipe or a socket
        raise WorldError(
            f"a loader process died ({first_line(error)}); if memory ran out, give fewer --loader-workers or a "
            "smaller --loader-cache-bytes"
        ) from error


class _StepsAndParts:
    """The order of the work: part 0 of the first step, part 1 of it, and so on."""

    def __init__(self, steps: range, count: int) -> None:
        self._steps, self._count = steps, count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, number) for step in self._steps for number in range(self._count))

    def __len__(self) -> int:
        return len(self._steps) * self._count


class _Parts(Dataset[Any]):
    """What the loader processes run. DataLoader gives work i to process i mod N, which keeps the caches apart."""

    def __init__(self, open_reader: Callable[..., BatchReader], count: int) -> None:
        self._open_reader, self._count = open_reader, count
        self._readers: dict[int, BatchReader] = {}

    def __getitem__(self, where: tuple[int, int]) -> Part | BaseException:
        step, number = where
        try:
            if number not in self._readers:
                self._readers[number] = self._open_reader(part=(number, self._count))
            return self._readers[number].read(step)
        except Exception as error:  # as it is: DataLoader would bury our one line in a traceback of another process
            return error


def _as_it_is(part: Any) -> Any:
    return part


def _settle(_worker: int) -> None:
    torch.set_num_threads(1)


class _Ahead(Generic[T]):
    """The thread and its queue. The thread must not know the ``Loader``, or a dropped loader could never be freed."""

    def __init__(self, batches: Iterable[T], prefetch: int) -> None:
        self._done: queue.SimpleQueue[_Item[T]] = queue.SimpleQueue()
        self._slots = threading.Semaphore(prefetch)
        self._stop = threading.Event()
        arguments = (iter(batches), self._done, self._slots, self._stop)
        self._thread = threading.Thread(target=_prepare_ahead, args=arguments, name="data-loader", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """The next batch, StopIteration at the end, or the error that ended the thread."""
        item = self._done.get()
        self._slots.release()
        # The error object itself, so that its traceback shows where in the thread it was raised.
        if isinstance(item, BaseException):
            raise item
        return item[0]

    def stop(self) -> None:
        self._stop.set()
        self._slots.release()
        self._done.put(StopIteration())  # a consumer that waits in another thread must not wait for ever
        # A read from slow storage cannot be interrupted: do not wait for it, the daemon thread ends right after it.
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_JOIN_SECONDS)


_Item = tuple[T] | BaseException


def _prepare_ahead(
    batches: Iterator[T],
    done: "queue.SimpleQueue[_Item[T]]",
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        while True:
            slots.acquire()
            if stop.is_set():
                return
            done.put((next(batches),))
    except BaseException as error:  # whatever it is, also the end: the consumer waits for an answer
        done.put(error)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
