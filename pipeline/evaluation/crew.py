"""Ray actors that come and go, and work spread over them: results in the order of the work, whoever does what when.

Ray's ``ActorPool`` gives work to actors that no node has room for yet, and cannot replace one that is dead. Here an
actor gets work once it has started; a lost one is replaced and costs the piece that it had.
"""

import contextlib
import heapq
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.errors import UserError, WorldError

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["Crew"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WAIT_SECONDS = 60.0


@dataclass(order=True)
class _Piece:
    """A piece of work; pieces are ordered by their place."""

    place: int
    work: Any = field(compare=False)
    losses: int = field(default=0, compare=False)
    """Actors that died over it."""


class _Progress:
    """Which pieces are to be done, and which results wait until it is their turn."""

    def __init__(self, work: Iterable[Any], *, ahead: int) -> None:
        self._places = enumerate(work)
        self._next = next(self._places, None)
        self._ahead = ahead
        self._lost: list[_Piece] = []
        self._done: dict[int, Any] = {}
        self._taken = self._given = 0

    @property
    def is_over(self) -> bool:
        """Whether every result was given out."""
        return self._next is None and self._given == self._taken

    def take(self) -> _Piece | None:
        """The next piece to do; None if there is none, or too many results wait already."""
        if self._lost:
            return heapq.heappop(self._lost)
        if self._next is None or self._taken - self._given >= self._ahead:
            return None
        piece = _Piece(*self._next)
        self._taken += 1
        self._next = next(self._places, None)
        return piece

    def give_back(self, piece: _Piece) -> None:
        heapq.heappush(self._lost, piece)

    def finish(self, piece: _Piece, result: Any) -> None:
        self._done[piece.place] = result

    def results(self) -> Iterator[Any]:
        """Results whose turn it is."""
        while self._given in self._done:
            self._given += 1
            yield self._done.pop(self._given - 1)


class Crew:
    """Actors of one kind."""

    def __init__(self, hire: Callable[[], Any], *, size: int, max_losses: int) -> None:
        """Asks for the actors; work begins with the first that has started.

        Args:
            hire: Creates an actor, which has a method ``ready``.
            size: How many; those that the cluster has no room for join when it has.
            max_losses: Actors that may die over one piece of work, or at their start, before it is given up.
        """
        self._hire, self._size, self._max_losses = hire, size, max_losses
        self._starting: dict[ObjectRef[Any], Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[ObjectRef[Any], tuple[Any, _Piece | None]] = {}
        self._failed_starts = 0
        for _ in range(size):
            self._start()

    def results(self, submit: "Callable[[Any, T], ObjectRef[Any]]", work: Iterable[T]) -> Iterator[Any]:
        """Results of all pieces of work in their order; at most two for each actor wait for their turn.

        Args:
            submit: Gives a piece to an actor.
            work: The pieces, taken one by one.

        Raises:
            UserError: As the actor raised it.
            WorldError: Likewise; or a piece has cost too many actors, or none can start.
        """
        progress = _Progress(work, ahead=2 * self._size)
        try:
            while not progress.is_over:
                self._give_out(progress, submit)
                self._wait(progress)
                self._give_out(progress, submit)  # actors must not wait for whoever takes the results
                yield from progress.results()
        finally:  # What was left unfinished must not come out as a result of the next work.
            self._busy = {reference: (actor, None) for reference, (actor, _) in self._busy.items()}

    def _give_out(self, progress: _Progress, submit: "Callable[[Any, T], ObjectRef[Any]]") -> None:
        while self._idle and (piece := progress.take()) is not None:
            actor = self._idle.pop()
            self._busy[submit(actor, piece.work)] = (actor, piece)

    def close(self) -> None:
        """Ends all actors."""
        for actor in [*self._starting.values(), *self._idle, *(actor for actor, _ in self._busy.values())]:
            ray.kill(actor)
        self._starting, self._idle, self._busy = {}, [], {}

    def _start(self) -> None:
        actor = self._hire()
        self._starting[actor.ready.remote()] = actor

    def _wait(self, progress: _Progress) -> None:
        if not (references := [*self._busy, *self._starting]):
            return
        ready, _ = ray.wait(references, timeout=_WAIT_SECONDS)
        if not ready and not self._busy:
            logger.info("waiting for a worker: the cluster has no room for one now")
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
            else:
                self._done(reference, progress)

    def _started(self, reference: "ObjectRef[Any]") -> None:
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts > self._max_losses:
                raise WorldError(f"an evaluation worker cannot start: {_last_line(error)}") from error
            self._start()
            return
        self._failed_starts = 0
        self._idle.append(actor)

    def _done(self, reference: "ObjectRef[Any]", progress: _Progress) -> None:
        actor, piece = self._busy.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            self._idle.append(actor)
            if piece is None:
                return
            cause = error.cause
            raise cause if isinstance(cause, UserError | WorldError) else WorldError(_last_line(error)) from error
        except RayError as error:  # The actor died, or its node did with the result.
            self._replace(actor)
            if piece is None:
                return
            piece.losses += 1
            if piece.losses > self._max_losses:
                raise WorldError(f"an evaluation worker was lost: {_last_line(error)}") from error
            logger.warning("an evaluation worker was lost; what it was doing is done again (%s)", _last_line(error))
            progress.give_back(piece)
            return
        self._idle.append(actor)
        if piece is not None:
            progress.finish(piece, result)

    def _replace(self, actor: Any) -> None:
        with contextlib.suppress(RayError):
            ray.kill(actor)
        self._start()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else json.dumps(type(error).__name__)
