"""The space of a sweep: which combinations of knobs there are, which are sound, and what their runs are called."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import SamplingConfig, TrainConfig, TuneConfig, as_params, override
from pipeline.errors import UserError
from pipeline.sweep.dimension import Choice, Dimension, knob_types, parse_search
from pipeline.training.task import check_model

__all__ = ["Axis", "Pick", "Point", "Refused", "Trial", "grid_points", "point_of", "space_of", "unsound"]

_BETAS = "beta_range"
_MOST_LETTERS = 100
# What no trial may have of its own, and why.
_SHARED = {
    "steps": "all trials see the same number of images",
    "seed": "all trials share their random numbers; --seeds runs each combination several times",
    "use_gpu": "it is part of the protocol that all trials are judged by",
    "cpus_per_worker": "it is part of the protocol that all trials are judged by",
    **dict.fromkeys(("data", "experiment", "name", "preset", "audit_dir"), "all trials of a sweep share it"),
    **dict.fromkeys(
        knob_types(SamplingConfig), "it is part of the protocol; --sampling-search tries it on the trained models"
    ),
}
_ONLY_COSINE = {"cosine_s", "max_beta"}
_NEVER_COSINE = {_BETAS, "beta_start", "beta_end"}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One direction of the space."""

    name: str
    """The knob; ``beta_range`` stands for two."""
    dimension: Dimension

    def knobs(self, value: Any) -> dict[str, Any]:
        """The knobs that a value of this axis means."""
        if self.name != _BETAS:
            return {self.name: value}
        start, end = TuneConfig.parse_beta_range(value)
        return {"beta_start": start, "beta_end": end}

    def applies(self, schedule: str) -> bool:
        """Whether a schedule has it: cosine has no beta range, the others have no offset and no clipping."""
        return self.name not in (_NEVER_COSINE if schedule == "cosine" else _ONLY_COSINE)


Pick = Callable[[Axis], Any]
"""Chooses a value on an axis."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination."""

    key: str
    """Names it within its sweep, the same whenever and wherever it is made."""
    knobs: Mapping[str, Any]
    """What it changes in the sweep's base config, by leaf name."""
    drawn: Mapping[str, Any]
    """The values on the axes."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Point":
        """A point from JSON values, which know no tuples."""

        def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

        return cls(key=record["key"], knobs=tuples(record["knobs"]), drawn=tuples(record["drawn"]))

    def trials(self, config: TuneConfig) -> "list[Trial]":
        """One trial for each seed."""
        first = config.base.seed
        return [Trial(point=self, seed=first + n, is_first=n == 0) for n in range(config.seeds)]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a point."""

    point: Point
    seed: int
    is_first: bool

    @property
    def key(self) -> str:
        """Names the trial within its sweep."""
        return self.point.key if self.is_first else f"{self.point.key}-seed{self.seed}"

    def config(self, base: TrainConfig, sweep: str) -> TrainConfig:
        """The trial's training run. Raises ``UserError`` if a knob is refused."""
        trained = override(base, {**self.point.knobs, "seed": self.seed})
        return replace(trained, name=f"{sweep}-{self.key}", steps=_steps(base, trained))


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A combination that cannot be trained and judged like the others, and why."""

    key: str
    reason: str


def space_of(config: TuneConfig) -> tuple[Axis, ...]:
    """The axes, the schedule first, since others depend on it.

    Raises:
        UserError: ``--search`` names no knob, or one that all trials must share.
    """
    axes: dict[str, Dimension] = {
        "schedule": Choice(config.schedules),
        "T": Choice(config.Ts),
        _BETAS: Choice(config.beta_ranges),
    }
    for text in config.search:
        name, dimension = parse_search("--search", text, knob_types(TrainConfig))
        if name in _SHARED:
            raise UserError(f"--search {text!r}: {_SHARED[name]}")
        if name == "batch_size" and config.early_stopping:
            raise UserError(f"--search {text!r}: --early-stopping compares trials at the same step, so they need one")
        if name in ("beta_start", "beta_end"):
            axes.pop(_BETAS, None)
        axes[name] = dimension
    return tuple(Axis(name=name, dimension=dimension) for name, dimension in axes.items())


def point_of(axes: tuple[Axis, ...], pick: Pick) -> Point:
    """The point that ``pick`` chooses, axis by axis; axes that its schedule does not have are left out."""
    drawn: dict[str, Any] = {}
    knobs: dict[str, Any] = {}
    for axis in axes:
        if axis.applies(str(knobs.get("schedule", ""))):
            drawn[axis.name] = pick(axis)
            knobs |= axis.knobs(drawn[axis.name])
    return Point(key=_key(knobs), knobs=knobs, drawn=drawn)


def grid_points(axes: tuple[Axis, ...]) -> Iterator[Point]:
    """Every combination, once.

    Raises:
        UserError: An axis has no end of values.
    """
    for axis in axes:
        if not isinstance(axis.dimension, Choice):
            raise UserError(
                f"--search {axis.name}: --algorithm grid tries every value; give choice(...), or --algorithm random"
            )
    known: set[str] = set()
    for values in _combinations(axes):
        point = point_of(axes, lambda axis, values=values: values[axis.name])  # type: ignore[misc]
        if point.key not in known:
            known.add(point.key)
            yield point


def _combinations(axes: tuple[Axis, ...]) -> Iterator[dict[str, Any]]:
    if not axes:
        yield {}
        return
    first, rest = axes[0], axes[1:]
    assert isinstance(first.dimension, Choice)
    for value in first.dimension.values:
        for others in _combinations(rest):
            yield {first.name: value, **others}


def unsound(point: Point, config: TuneConfig) -> str | None:
    """Why a point cannot be a trial: no schedule, no network, or another number of network evaluations."""
    try:
        for trial in point.trials(config)[:1]:
            check_model(trial.config(config.base, "sweep"))
    except UserError as error:
        return str(error)
    return None


def _steps(base: TrainConfig, trained: TrainConfig) -> int:
    """As many steps as make the same number of images."""
    images = base.steps * base.data.batch_size
    if images % trained.data.batch_size:
        raise UserError(f"--batch-size {trained.data.batch_size}: the {images:,} images of a trial are no whole steps")
    return images // trained.data.batch_size


def _key(knobs: Mapping[str, Any]) -> str:
    parts = [str(knobs["schedule"]), f"T{knobs['T']}"]
    both = {"beta_start", "beta_end"} <= knobs.keys()
    if both:
        parts.append(f"beta{knobs['beta_start']:g}-{knobs['beta_end']:g}")
    hidden = {"schedule", "T", *(("beta_start", "beta_end") if both else ())}
    parts += [f"{name}{text}" for name, text in as_params(dict(knobs)).items() if name not in hidden]
    key = "-".join(parts)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", key)
    if plain == key and len(key) <= _MOST_LETTERS:
        return key
    return f"{plain[:_MOST_LETTERS]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
