"""What a report on an experiment shows, read from MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.protocol import differences
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["Curve", "Point", "ReportData", "Section", "Sheet", "collect"]

_MAX_SHEETS = 12


@dataclass(frozen=True, kw_only=True)
class Point:
    """A result."""

    step: int
    value: float
    interval: tuple[float, float] | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run's results by one protocol, by step."""

    run: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Section:
    """All results of one protocol: the only numbers that may stand in one chart."""

    identity: str
    metric: str
    protocol: Mapping[str, Any]
    unlike_first: Sequence[str]
    """What differs from the first section's protocol."""
    curves: Sequence[Curve]

    @property
    def best(self) -> list[tuple[str, Point]]:
        """Runs and results, the smallest distance first."""
        pairs = [(curve.run, point) for curve in self.curves for point in curve.points]
        return sorted(pairs, key=lambda pair: pair[1].value)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A sample sheet as the bytes of a PNG file."""

    run: str
    step: int
    png: bytes


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """An experiment."""

    experiment: str
    num_checkpoints: int
    num_pending: int
    """Without any result."""
    sections: Sequence[Section]
    sheets: Sequence[Sheet]
    champion: str | None
    """In words."""


def collect(experiment: str, registered: str, tracker: Tracker) -> ReportData:
    """Reads an experiment.

    Args:
        experiment: Its name.
        registered: Name of the registered model whose champion is told.
        tracker: Connected to MLflow.

    Raises:
        UserError: No such experiment, or it has no published checkpoint.
        WorldError: MLflow is away.
    """
    checkpoints = tracker.checkpoints(tracker.experiment(experiment, create=False))
    if not checkpoints:
        raise UserError(f"experiment {experiment!r} has no published checkpoint yet; there is nothing to report")
    present = tracker.champion(registered)
    champion = next((entry for entry in checkpoints if entry.model_id == present), None)
    return ReportData(
        experiment=experiment,
        num_checkpoints=len(checkpoints),
        num_pending=sum(not checkpoint.results() for checkpoint in checkpoints),
        sections=_sections(checkpoints),
        sheets=_sheets(checkpoints, tracker),
        champion=None
        if champion is None
        else f"{champion.run_name} step {champion.step} (models:/{registered}@champion)",
    )


def _sections(checkpoints: Sequence[Checkpoint]) -> list[Section]:
    """Protocols with the most results first."""
    protocols: dict[str, Mapping[str, Any]] = {}
    points: dict[str, dict[str, list[Point]]] = {}
    for checkpoint in checkpoints:
        for identity, result in checkpoint.results().items():
            protocols.setdefault(identity, result["protocol"])
            point = _point(checkpoint.step, result)
            points.setdefault(identity, {}).setdefault(checkpoint.run_name, []).append(point)
    order = sorted(points, key=lambda identity: (-sum(map(len, points[identity].values())), identity))
    return [
        Section(
            identity=identity,
            metric=str(protocols[identity].get("metric", "distance")),
            protocol=protocols[identity],
            unlike_first=differences(protocols[order[0]], protocols[identity]),
            curves=[
                Curve(run=run, points=sorted(found, key=lambda point: point.step))
                for run, found in sorted(points[identity].items())
            ],
        )
        for identity in order
    ]


def _point(step: int, result: Mapping[str, Any]) -> Point:
    """A result whose metric has companions ``_low`` and ``_high`` has an interval."""
    metric, metrics = str(result["protocol"].get("metric", "")), result["metrics"]
    value = float(metrics.get(metric, next(iter(metrics.values()))))
    low, high = metrics.get(f"{metric}_low"), metrics.get(f"{metric}_high")
    interval = None if low is None or high is None else (float(low), float(high))
    return Point(step=step, value=value, interval=interval, note=str(result["protocol"].get("note", "")))


def _sheets(checkpoints: Sequence[Checkpoint], tracker: Tracker) -> list[Sheet]:
    """The sheet of each run's last checkpoint that has one, of the newest runs."""
    runs = list(dict.fromkeys((checkpoint.run_id, checkpoint.run_name) for checkpoint in checkpoints))
    found = []
    for run_id, run in runs[:_MAX_SHEETS]:
        if (last := tracker.last_sheet(run_id)) is not None:
            found.append(Sheet(run=run, step=last[0], png=last[1]))
    return found
