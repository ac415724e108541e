"""What a report on an experiment shows, read from MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.compare import MORE_IS_BETTER
from pipeline.evaluation.protocol import differences
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["Curve", "Point", "ReportData", "Section", "Sheet", "collect"]

_MAX_SHEETS = 12
_DISTANCES = ("fid", "fd_")
"""Beginnings of the metrics that are Frechet distances."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A result."""

    step: int
    value: float
    interval: tuple[float, float] | None
    note: str
    others: Mapping[str, float] = field(default_factory=dict)
    """What was measured with it, such as recall with precision."""


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
    """What differs from the protocol of the first section with this metric; empty for that one."""
    curves: Sequence[Curve]

    @property
    def best(self) -> list[tuple[str, Point]]:
        """Runs and results, the best first: of a distance the smallest, of a score the largest."""
        pairs = [(curve.run, point) for curve in self.curves for point in curve.points]
        return sorted(pairs, key=lambda pair: pair[1].value, reverse=self.metric.startswith(MORE_IS_BETTER))

    @property
    def note(self) -> str:
        """What all results are to be read with; empty if there is nothing, or not the same for all."""
        notes = {point.note for _, point in self.best}
        return notes.pop() if len(notes) == 1 else ""


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
    """Frechet distances first, then protocols with the most results; intervals are shown with their distance."""
    protocols: dict[str, Mapping[str, Any]] = {}
    points: dict[str, dict[str, list[Point]]] = {}
    for checkpoint in checkpoints:
        for identity, result in checkpoint.results().items():
            protocols.setdefault(identity, result["protocol"])
            point = _point(checkpoint.step, result)
            points.setdefault(identity, {}).setdefault(checkpoint.run_name, []).append(point)
    _join_intervals(protocols, points)

    def rank(identity: str) -> tuple[bool, int, str]:
        is_distance = _metric(protocols[identity]).startswith(_DISTANCES)
        return not is_distance, -sum(map(len, points[identity].values())), identity

    sections: list[Section] = []
    for identity in sorted(points, key=rank):
        metric = _metric(protocols[identity])
        first = next((section for section in sections if section.metric == metric), None)
        curves = [
            Curve(run=run, points=sorted(found, key=lambda point: point.step))
            for run, found in sorted(points[identity].items())
        ]
        sections.append(
            Section(
                identity=identity,
                metric=metric,
                protocol=protocols[identity],
                unlike_first=[] if first is None else differences(first.protocol, protocols[identity]),
                curves=curves,
            )
        )
    return sections


def _join_intervals(protocols: Mapping[str, Mapping[str, Any]], points: dict[str, dict[str, list[Point]]]) -> None:
    """Gives a distance the interval that was measured by the same protocol, in place of a section of its own."""

    def facts(identity: str) -> dict[str, Any]:
        return {name: value for name, value in protocols[identity].items() if name not in ("settings", "code", "note")}

    for identity in [each for each in points if "settings" in protocols[each]]:
        alike = [each for each in points if "settings" not in protocols[each] and facts(each) == facts(identity)]
        if not alike:
            continue
        intervals = {
            (run, point.step): point.interval for run, found in points.pop(identity).items() for point in found
        }
        for run, found in points[alike[0]].items():
            known = [replace(point, interval=intervals.get((run, point.step), point.interval)) for point in found]
            points[alike[0]][run] = known


def _metric(protocol: Mapping[str, Any]) -> str:
    return str(protocol.get("metric", "distance"))


def _point(step: int, result: Mapping[str, Any]) -> Point:
    """A result whose metric has companions ``_low`` and ``_high``, or a standard error, has an interval."""
    metric, metrics = _metric(result["protocol"]), result["metrics"]
    value = float(metrics.get(metric, next(iter(metrics.values()))))
    low, high, error = (metrics.get(f"{metric}_{name}") for name in ("low", "high", "stderr"))
    if low is None and error is not None:
        low, high = value - 1.96 * error, value + 1.96 * error
    interval = None if low is None or high is None else (float(low), float(high))
    # The note is about the covariance, which a Frechet distance alone depends on.
    note = str(result["protocol"].get("note", "")) if metric.startswith(_DISTANCES) else ""
    others = {name: float(each) for name, each in metrics.items() if not name.startswith(metric)}
    return Point(step=step, value=value, interval=interval, note=note, others=others)


def _sheets(checkpoints: Sequence[Checkpoint], tracker: Tracker) -> list[Sheet]:
    """The sheet of each run's last checkpoint that has one, of the newest runs."""
    runs = list(dict.fromkeys((checkpoint.run_id, checkpoint.run_name) for checkpoint in checkpoints))
    found = []
    for run_id, run in runs[:_MAX_SHEETS]:
        if (last := tracker.last_sheet(run_id)) is not None:
            found.append(Sheet(run=run, step=last[0], png=last[1]))
    return found
