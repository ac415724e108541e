"""Runs one function over many pieces of work: in this process, or as Ray tasks."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import UserError, WorldError

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["run_tasks"]

R = TypeVar("R")


def run_tasks(
    function: Callable[..., R], shared: Any, pieces: Iterable[tuple[Any, ...]], *, use_ray: bool
) -> Iterator[R]:
    """Calls ``function(shared, *piece)`` for each piece; results come in the order of their completion.

    Args:
        function: A module-level function.
        shared: Its first argument; with Ray it is sent once and not with every task.
        pieces: The other arguments; taken one by one as tasks end, so they may be read from a stream.
        use_ray: Run Ray tasks (Ray must be initialised) instead of calls in this process.

    Raises:
        UserError: As ``function`` raised it.
        WorldError: Likewise.
    """
    if not use_ray:
        yield from (function(shared, *piece) for piece in pieces)
        return
    import ray

    task = ray.remote(function)
    shared_reference = ray.put(shared)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    # Enough to keep every core busy, few enough that a failure is seen before thousands of tasks are queued.
    num_in_flight = 2 * max(1, int(resources.get("CPU", 1)))
    waiting = iter(pieces)
    running = [task.remote(shared_reference, *piece) for piece in islice(waiting, num_in_flight)]
    try:
        while running:
            (ready, *_), running = ray.wait(running, num_returns=1)
            yield _result(ready)
            running += [task.remote(shared_reference, *piece) for piece in islice(waiting, 1)]
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: "ObjectRef[R]") -> R:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Our own errors are one line that says what to do; Ray's wrapping would bury it in a remote traceback.
        if isinstance(error.cause, UserError | WorldError):
            raise error.cause from None
        raise
