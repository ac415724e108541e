"""A sweep's own record, one JSON file: what was asked for, which points were begun, how each trial ended.

It is what a sweep is continued from. Ray Tune keeps a state of its own beside it, which is pickled and never read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from pipeline import storage
from pipeline.config import TuneConfig, from_flat, to_flat
from pipeline.errors import UserError, WorldError
from pipeline.sweep.space import Point, Refused

__all__ = ["Ended", "SampledAs", "SweepRecord", "ended_of", "sweeps_root"]

_FILE = "sweep.json"
_VERSION = 1


def sweeps_root() -> str:
    """Where sweeps keep their records."""
    return storage.join(storage.home(), "sweeps")


@dataclass(frozen=True, kw_only=True)
class SampledAs:
    """A trained model's objective with other sampling knobs."""

    knobs: Mapping[str, Any]
    value: float
    identity: str
    """Of the protocol."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a trial ended."""

    status: Literal["finished", "stopped", "failed"]
    step: int = 0
    """The step that it reached."""
    value: float | None = None
    """The objective, smaller is better; None unless it finished."""
    rungs: Mapping[int, float] = field(default_factory=dict)
    """What early stopping saw, by step."""
    identity: str = ""
    """Of the protocol."""
    run_id: str = ""
    seconds: float | None = None
    images_seen: int = 0
    images_per_second: float | None = None
    error: str | None = None
    sampled: tuple[SampledAs, ...] = ()


@dataclass(kw_only=True)
class SweepRecord:
    """What is known of a sweep."""

    name: str
    config: TuneConfig
    points: dict[str, Point] = field(default_factory=dict)
    """Points that were begun, in their order."""
    refused: dict[str, Refused] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    """By the trial's key."""

    @classmethod
    def load(cls, name: str) -> "SweepRecord | None":
        """Reads the record of a sweep; None if there is none.

        Raises:
            WorldError: It is damaged, or storage does not answer.
        """
        location = _location(name)
        if not storage.exists(location):
            return None
        try:
            return cls._of(json.loads(storage.read_bytes(location)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise WorldError(f"{location} is damaged or of another version: {error!r}") from error

    def value_of(self, point: Point, config: TuneConfig) -> float | None:
        """A point's objective, the mean over its seeds; None unless all of them finished."""
        values = [self.ended[trial.key].value for trial in point.trials(config) if trial.key in self.ended]
        whole = [value for value in values if value is not None]
        return fmean(whole) if len(whole) == config.seeds else None

    def is_done(self, point: Point, config: TuneConfig) -> bool:
        """Whether every trial of a point has ended."""
        return all(trial.key in self.ended for trial in point.trials(config))

    def save(self) -> None:
        """Writes the record whole. Raises ``WorldError``."""
        text = json.dumps(
            {
                "version": _VERSION,
                "name": self.name,
                "config": to_flat(self.config),
                "points": [asdict(point) for point in self.points.values()],
                "refused": [asdict(entry) for entry in self.refused.values()],
                "ended": {key: asdict(entry) for key, entry in self.ended.items()},
            },
            indent=1,
        )
        storage.write_bytes(_location(self.name), text.encode(), patience_seconds=60)

    @classmethod
    def _of(cls, record: dict[str, Any]) -> "SweepRecord":
        if record["version"] != _VERSION:
            raise ValueError(f"version {record['version']}")
        return cls(
            name=record["name"],
            config=from_flat(TuneConfig, record["config"]),
            points={entry["key"]: Point.of(entry) for entry in record["points"]},
            refused={entry["key"]: Refused(**entry) for entry in record["refused"]},
            ended={key: ended_of(entry) for key, entry in record["ended"].items()},
        )


def _location(name: str) -> str:
    return storage.join(sweeps_root(), name, _FILE)


def ended_of(entry: Mapping[str, Any]) -> Ended:
    """An end from JSON values."""
    rungs = {int(step): value for step, value in entry["rungs"].items()}
    sampled = tuple(SampledAs(**one) for one in entry["sampled"])
    return Ended(**{**entry, "rungs": rungs, "sampled": sampled})
