"""What a sweep found, as a table for a person and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from pipeline.sweep.space import Refused

__all__ = ["SweepResult", "TrialResult"]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial: a value or an error."""

    run: str
    schedule: str
    T: int
    beta_start: float | None
    beta_end: float | None
    value: float | None
    """The objective: a Frechet distance, smaller is better."""
    images_per_second: float | None
    seconds: float | None
    error: str | None


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A finished sweep."""

    name: str
    run_id: str
    metric: str
    identity: str
    """The protocol that all trials were judged by."""
    trials: Sequence[TrialResult]
    refused: Sequence[Refused]
    ui: Sequence[str]

    @property
    def ranked(self) -> list[TrialResult]:
        """Finished trials, best first."""
        return sorted((t for t in self.trials if t.value is not None), key=lambda trial: trial.value or 0.0)

    @property
    def winner(self) -> TrialResult | None:
        """The trial with the smallest distance, if any finished."""
        return next(iter(self.ranked), None)

    def verdict(self) -> str:
        """One sentence; a single seed shows no spread, and the sentence says so."""
        ranked = self.ranked
        if not ranked:
            return "no trial finished"
        best = f"{_words(ranked[0])} won with {self.metric} {ranked[0].value:.3f}"
        if len(ranked) == 1:
            return f"{best}; no other trial finished"
        second = ranked[1]
        assert ranked[0].value is not None
        assert second.value is not None
        gap = second.value - ranked[0].value
        return (
            f"{best}, {gap:.3f} ({gap / second.value:.1%}) ahead of {_words(second)}; "
            "one seed each, so a small lead may be chance"
        )

    def to_csv(self) -> str:
        """All trials, one a line."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [entry.name for entry in fields(TrialResult)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(trial) for trial in [*self.ranked, *self._failed()])
        return buffer.getvalue()

    def text(self) -> str:
        """The table and the verdict."""
        header = ["trial", "T", "betas", self.metric, "images/s", "seconds"]
        rows = [header, *(_row(trial) for trial in [*self.ranked, *self._failed()])]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"refused {entry.key}: {entry.reason}" for entry in self.refused]
        lines += [f"failed {trial.run}: {trial.error}" for trial in self._failed()]
        return "\n".join(["", *lines, "", self.verdict(), f"sweep {self.name}", *self.ui])

    def _failed(self) -> list[TrialResult]:
        return [trial for trial in self.trials if trial.value is None]


def _words(trial: TrialResult) -> str:
    betas = "" if trial.beta_start is None else f" beta {trial.beta_start:g}..{trial.beta_end:g}"
    return f"{trial.schedule} T={trial.T}{betas}"


def _row(trial: TrialResult) -> list[str]:
    return [
        trial.schedule,
        str(trial.T),
        "-" if trial.beta_start is None else f"{trial.beta_start:g}..{trial.beta_end:g}",
        "failed" if trial.value is None else f"{trial.value:.3f}",
        "-" if trial.images_per_second is None else f"{trial.images_per_second:,.0f}",
        "-" if trial.seconds is None else f"{trial.seconds:.0f}",
    ]
