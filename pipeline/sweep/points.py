"""Which points a sweep tries, one after the other: a list that is known from the start, or Optuna's proposals."""

import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pipeline import draws
from pipeline.config import TuneConfig
from pipeline.errors import UserError
from pipeline.sweep.dimension import Choice
from pipeline.sweep.space import Axis, Point, Refused, grid_points, point_of, space_of, unsound

if TYPE_CHECKING:
    import optuna

__all__ = ["Listed", "Proposed", "Source", "open_source"]

logger = logging.getLogger(__name__)

_DRAWS_A_POINT = 100
"""Draws for one new sound point, before the space counts as used up."""


class Source(Protocol):
    """Gives points, and is told what they were worth."""

    refused: dict[str, Refused]
    """Combinations that were refused, by key."""

    def next(self) -> Point | None:
        """The next point; None if there is no further one."""

    def tell(self, key: str, value: float | None) -> None:
        """Takes a point's objective; None if it has none, since a trial of it failed or was stopped."""


def open_source(config: TuneConfig, known: Sequence[tuple[Point, float | None, bool]] = ()) -> Source:
    """The source that ``config`` asks for.

    Args:
        config: Space and algorithm.
        known: Points that an earlier driver of this sweep has begun, their values, and whether they are done.

    Raises:
        UserError: The space is refused, or has no sound point.
    """
    axes = space_of(config)
    if config.algorithm == "optuna":
        return Proposed(axes, config, known)
    points, refused = _grid(axes, config) if config.algorithm == "grid" else _random(axes, config)
    if not points:
        raise _empty(refused.values())
    return Listed(points, refused)


class Listed:
    """Points that are known from the start; what came out of some changes nothing for others."""

    def __init__(self, points: Sequence[Point], refused: dict[str, Refused]) -> None:
        self.points = points
        self.refused = refused
        self._left = iter(points)

    def next(self) -> Point | None:
        """The next of the list."""
        return next(self._left, None)

    def tell(self, key: str, value: float | None) -> None:
        """Nothing depends on it."""


def _grid(axes: tuple[Axis, ...], config: TuneConfig) -> tuple[list[Point], dict[str, Refused]]:
    points: list[Point] = []
    refused: dict[str, Refused] = {}
    for point in grid_points(axes):
        _sort(point, config, points, refused)
    return points, refused


def _random(axes: tuple[Axis, ...], config: TuneConfig) -> tuple[list[Point], dict[str, Refused]]:
    """Draw n is a function of (seed, n): a sweep that goes on finds the same points."""
    points: list[Point] = []
    refused: dict[str, Refused] = {}
    seen: set[str] = set()
    for number in range(_DRAWS_A_POINT * config.num_trials):
        generator = draws.generator(config.base.seed, draws.Purpose.SWEEP_POINT, number)
        point = point_of(axes, lambda axis, generator=generator: axis.dimension.draw(generator))  # type: ignore[misc]
        if point.key not in seen:
            seen.add(point.key)
            _sort(point, config, points, refused)
        if len(points) == config.num_trials:
            break
    return points, refused


def _sort(point: Point, config: TuneConfig, points: list[Point], refused: dict[str, Refused]) -> None:
    if (reason := unsound(point, config)) is None:
        points.append(point)
    else:
        refused[point.key] = Refused(key=point.key, reason=reason)


class Proposed:
    """Optuna's TPE over the conditional space, which is defined as it is drawn: cosine has no beta range."""

    def __init__(
        self, axes: tuple[Axis, ...], config: TuneConfig, known: Sequence[tuple[Point, float | None, bool]]
    ) -> None:
        """Takes up the points of an earlier driver; those that are not done are given out first.

        Raises:
            UserError: The space has no sound point.
        """
        self.refused: dict[str, Refused] = {}
        self._axes, self._config = axes, config
        self._asked: dict[str, optuna.trial.Trial] = {}
        self._again = [point for point, _, is_done in known if not is_done]
        # Another driver must not propose again what the first one did.
        self._study = _study(config, config.base.seed + len(known))
        for point, value, is_done in known:
            self._take_up(point)
            if is_done:
                self.tell(point.key, value)
        self._given = len(known) - len(self._again)
        if not known:
            if (first := self._propose()) is None:
                raise _empty(self.refused.values())
            self._again.append(first)

    def next(self) -> Point | None:
        """The next proposal, after those that were begun before."""
        if self._given >= self._config.num_trials:
            return None
        point = self._again.pop(0) if self._again else self._propose()
        self._given += point is not None
        return point

    def tell(self, key: str, value: float | None) -> None:
        """Passes a value on; without one the point counts as worse than all that have one."""
        from optuna.trial import TrialState

        if value is None:
            self._study.tell(self._asked[key], state=TrialState.PRUNED)
        else:
            self._study.tell(self._asked[key], value)

    def _propose(self) -> Point | None:
        from optuna.trial import TrialState

        for _ in range(_DRAWS_A_POINT):
            trial = self._study.ask()
            point = point_of(self._axes, lambda axis, trial=trial: _suggest(trial, axis))  # type: ignore[misc]
            reason = None if point.key in self._asked else unsound(point, self._config)
            if point.key in self._asked or reason is not None:
                self._study.tell(trial, state=TrialState.PRUNED)
                if reason is not None:
                    self.refused[point.key] = Refused(key=point.key, reason=reason)
                continue
            self._asked[point.key] = trial
            return point
        logger.info("no new combination was found in %d draws: the space is used up", _DRAWS_A_POINT)
        return None

    def _take_up(self, point: Point) -> None:
        fixed = {axis.name: _as_param(axis, point.drawn[axis.name]) for axis in self._axes if axis.name in point.drawn}
        self._study.enqueue_trial(fixed)
        trial = self._study.ask()
        point_of(self._axes, lambda axis: _suggest(trial, axis))
        self._asked[point.key] = trial


def _study(config: TuneConfig, seed: int) -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # With few trials most of them must not be drawn blindly.
    blind = max(1, min(10, config.num_trials // 3))
    sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=blind, constant_liar=True)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _as_param(axis: Axis, value: Any) -> Any:
    """Optuna's categories are texts: it has no lists."""
    return json.dumps(value) if isinstance(axis.dimension, Choice) else value


def _suggest(trial: "optuna.trial.Trial", axis: Axis) -> Any:
    dimension = axis.dimension
    if isinstance(dimension, Choice):
        by_text: Mapping[str, Any] = {json.dumps(value): value for value in dimension.values}
        return by_text[trial.suggest_categorical(axis.name, list(by_text))]
    if dimension.is_int:
        return trial.suggest_int(axis.name, int(dimension.low), int(dimension.high))
    return dimension.rounded(trial.suggest_float(axis.name, dimension.low, dimension.high, log=dimension.is_log))


def _empty(refused: Iterable[Refused]) -> UserError:
    by_reason: dict[str, list[str]] = {}
    for entry in refused:
        by_reason.setdefault(entry.reason, []).append(entry.key)
    words = (f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}: {reason}" for reason, keys in by_reason.items())
    return UserError(f"the sweep has no trial left: {'; '.join(words)}")
