"""Batches ahead of time: a background thread prepares the next ones while the model trains on the present one."""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from types import TracebackType

from pipeline.data.batches import Batch, BatchReader
from pipeline.data.order import StreamOrder
from pipeline.data.shards import Manifest

__all__ = ["DEFAULT_CACHE_BYTES", "Batch", "Loader"]

DEFAULT_CACHE_BYTES = 256 * 2**20
_JOIN_SECONDS = 1.0


class Loader(Iterator[Batch]):
    """One worker's batches of the steps ``start_step .. end_step - 1``, in order.

    Every rank gives the same number of batches, whatever the sizes of the shards. There is no state to save: a new
    loader with another ``start_step`` goes on where this one stopped, with any number of workers.

    Memory: encoded shards up to ``cache_bytes`` (but always those that the present batch reads, about one a stream of
    this worker), decoded uint8 images up to ``cache_bytes`` again, and ``prefetch`` batches.

    Args:
        location: The data set's folder, local or ``s3://``.
        manifest: Its manifest.
        order: The canonical order over the manifest's shards.
        rank: This worker, in [0, num_workers).
        num_workers: Workers that train; must divide ``order.num_streams``.
        random_flip: Mirror images left to right with probability 1/2. The draws belong to (seed, step, stream): they do
            not depend on the number of workers.
        start_step: First step, from 0.
        end_step: One past the last step.
        cache_bytes: Budget of each of the two caches, in bytes.
        prefetch: Batches prepared ahead, at least 1.

    Raises:
        UserError: ``num_workers`` does not divide the number of streams.
        WorldError: (while iterating) a shard is missing or damaged, or an image is not what the manifest says.
    """

    def __init__(
        self,
        location: str,
        manifest: Manifest,
        order: StreamOrder,
        *,
        rank: int,
        num_workers: int,
        random_flip: bool,
        start_step: int,
        end_step: int,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        prefetch: int = 2,
    ) -> None:
        """Starts to prepare the first batches at once."""
        assert start_step >= 0, f"start_step {start_step}"
        assert prefetch >= 1, f"prefetch {prefetch}"
        reader = BatchReader(
            location,
            manifest,
            order,
            rank=rank,
            num_workers=num_workers,
            random_flip=random_flip,
            cache_bytes=cache_bytes,
        )
        self._wait_seconds = 0.0
        self._ahead = _Ahead(reader, range(start_step, end_step), prefetch)
        # Unlike __del__ it also runs at the exit of the interpreter, before torch is torn down under the thread.
        self._stop = weakref.finalize(self, self._ahead.stop)

    @property
    def wait_seconds(self) -> float:
        """Time that ``next`` has waited for data so far, summed; near 0 when the data keeps up with the model."""
        return self._wait_seconds

    def __iter__(self) -> "Loader":
        """Itself: a loader is read once."""
        return self

    def __next__(self) -> Batch:
        """The next step's batch; ends after ``end_step - 1`` and after ``close``."""
        if not self._stop.alive:
            raise StopIteration
        started = time.monotonic()
        item = self._ahead.take()
        self._wait_seconds += time.monotonic() - started
        if isinstance(item, Batch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        # The error object itself, so that its traceback shows where in the thread it was raised.
        raise item

    def close(self) -> None:
        """Ends the background thread. May be called twice; a loader that is dropped or left at exit closes itself."""
        self._stop()

    def __enter__(self) -> "Loader":
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


class _Ahead:
    """The thread and its queue. The thread must not know the ``Loader``, or a dropped loader could never be freed."""

    def __init__(self, reader: BatchReader, steps: range, prefetch: int) -> None:
        self._done: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._slots = threading.Semaphore(prefetch)
        self._stop = threading.Event()
        arguments = (reader, steps, self._done, self._slots, self._stop)
        self._thread = threading.Thread(target=_prepare_ahead, args=arguments, name="data-loader", daemon=True)
        self._thread.start()

    def take(self) -> Batch | BaseException | None:
        """The next batch, None at the end, or the error that ended the thread."""
        item = self._done.get()
        self._slots.release()
        return item

    def stop(self) -> None:
        self._stop.set()
        self._slots.release()
        self._done.put(None)  # a consumer that waits in another thread must not wait for ever
        # A read from slow storage cannot be interrupted: do not wait for it, the daemon thread ends right after it.
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_JOIN_SECONDS)


def _prepare_ahead(
    reader: BatchReader,
    steps: range,
    done: "queue.SimpleQueue[Batch | BaseException | None]",
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        for step in steps:
            slots.acquire()
            if stop.is_set():
                return
            done.put(reader.read(step))
        done.put(None)
    except BaseException as error:  # whatever it is, the consumer waits for an answer
        done.put(error)
