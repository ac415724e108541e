"""Stored results side by side: only those of one protocol, and where there is none, what differs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.frechet import NORMAL_95
from pipeline.evaluation.protocol import differences
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["MORE_IS_BETTER", "Comparison", "Row", "Table", "compare"]

MORE_IS_BETTER = ("precision", "recall", "density", "coverage", "inception_score")
"""Beginnings of the metrics of which more is better; of the others less is."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint's value by the protocol of its table."""

    run: str
    step: int
    value: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """All checkpoints by one protocol, in the order of their values."""

    metric: str
    identity: str
    rows: Sequence[Row]

    def lines(self) -> list[str]:
        """For a person; each row says how far it is from the first, and whether that is within the error."""
        first = self.rows[0]
        lines = [f"{self.metric} (protocol {self.identity})"]
        width = max(len(_name(row)) for row in self.rows)
        for row in self.rows:
            error = "" if row.standard_error is None else f" +- {NORMAL_95 * row.standard_error:.3g}"
            lines.append(f"  {_name(row):{width}}  {row.value:.4f}{error}{_gap(first, row)}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all of the checkpoints have been measured by."""

    tables: Sequence[Table]

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return {"tables": [asdict(table) for table in self.tables], "exit_code": 0}

    def text(self) -> str:
        """The tables, for a person."""
        return "\n".join(line for table in self.tables for line in table.lines())


def compare(names: Sequence[str], tracker: Tracker) -> Comparison:
    """Puts stored results of checkpoints side by side; measures nothing.

    Args:
        names: ``RUN`` for its last checkpoint that has a result, or ``RUN:STEP``.
        tracker: Connected to MLflow.

    Raises:
        UserError: No such run or step, no result, or two of them have no protocol in common: the fields that differ
            are named.
    """
    chosen = [_chosen(name, tracker) for name in names]
    results = [checkpoint.results() for checkpoint in chosen]
    common = [identity for identity in results[0] if all(identity in found for found in results)]
    if not common:
        raise UserError(_why_not(chosen, results))
    tables = [_table(identity, chosen) for identity in common]
    return Comparison(
        tables=sorted(tables, key=lambda table: (not table.metric.startswith(("fid", "fd_")), table.metric))
    )


def _chosen(name: str, tracker: Tracker) -> Checkpoint:
    run, colon, step = name.rpartition(":")
    run, wanted = (run, step) if colon and step.isdigit() else (name, "")
    found = tracker.find_run(run)
    if found is None:
        known = ", ".join(tracker.run_names()) or "none"
        raise UserError(f"--compare {name}: no run is called {run!r}; give RUN or RUN:STEP; the newest are: {known}")
    checkpoints = tracker.checkpoints(found.info.experiment_id, run_id=found.info.run_id)
    measured = {checkpoint.step: checkpoint for checkpoint in checkpoints if checkpoint.results()}
    if not measured:
        raise UserError(f"--compare {name}: no checkpoint of {run!r} has a result yet; evaluate it first: --run {run}")
    if wanted and int(wanted) not in measured:
        raise UserError(f"--compare {name}: no result at step {wanted}; there are results at {sorted(measured)}")
    return measured[int(wanted) if wanted else max(measured)]


def _why_not(chosen: Sequence[Checkpoint], results: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Names the fields that differ in the two protocols of the first unlike pair that are nearest to each other."""
    for (a, of_a), (b, of_b) in combinations(zip(chosen, results, strict=True), 2):
        if not of_a.keys() & of_b.keys():
            unlike = [differences(one["protocol"], two["protocol"]) for one in of_a.values() for two in of_b.values()]
            names = f"{a.run_name} step {a.step} and {b.run_name} step {b.step}"
            fields = "; ".join(sorted(unlike, key=len)[0])
            return f"{names} have no result of one protocol: {fields}; evaluate both with the same flags"
    return "no protocol is common to all of them; evaluate all with the same flags"


def _table(identity: str, chosen: Sequence[Checkpoint]) -> Table:
    protocol = chosen[0].result(identity)["protocol"]
    metric = str(protocol["metric"])
    rows = []
    for checkpoint in chosen:
        metrics: Mapping[str, float] = checkpoint.result(identity)["metrics"]
        rows.append(
            Row(
                run=checkpoint.run_name,
                step=checkpoint.step,
                value=float(metrics[metric]),
                standard_error=metrics.get(f"{metric}_stderr"),
            )
        )
    rows.sort(key=lambda row: row.value, reverse=metric.startswith(MORE_IS_BETTER))
    return Table(metric=metric, identity=identity, rows=rows)


def _name(row: Row) -> str:
    return f"{row.run} step {row.step}"


def _gap(first: Row, row: Row) -> str:
    if row is first:
        return ""
    gap = abs(row.value - first.value)
    words = f"  {gap:.3g} behind"
    if first.standard_error is None or row.standard_error is None:
        return words
    within = gap <= NORMAL_95 * math.hypot(first.standard_error, row.standard_error)
    return f"{words}, {'within' if within else 'beyond'} the error of the difference"
