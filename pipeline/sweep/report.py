"""What a sweep found, as a table for a person and as CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.config import as_params
from pipeline.sweep.record import SampledAs
from pipeline.sweep.space import Refused
from pipeline.sweep.verdict import Score, verdict

__all__ = ["SweepResult", "TrialResult"]

_MOST_REFUSED = 10


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial: a value or why there is none."""

    run: str
    run_id: str = ""
    point: str
    """The combination, which trials of other seeds share."""
    seed: int = 0
    status: Literal["finished", "stopped", "failed"]
    schedule: str
    T: int
    beta_start: float | None
    beta_end: float | None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """What else it changes in the sweep's base."""
    value: float | None
    """The objective, smaller is better."""
    step: int = 0
    """The step that it reached."""
    images_seen: int = 0
    images_per_second: float | None
    seconds: float | None
    error: str | None
    sampled: Sequence[SampledAs] = ()
    """The objective with other sampling knobs, of the same model."""

    @property
    def words(self) -> str:
        """The combination for a person."""
        betas = "" if self.beta_start is None else f" beta {self.beta_start:g}..{self.beta_end:g}"
        others = "".join(f" {name} {text}" for name, text in as_params(dict(self.knobs)).items())
        return f"{self.schedule} T={self.T}{betas}{others}"


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
    registered: str | None = None
    """Which model got the alias, in words."""
    report: str | None = None
    """Where the report lies."""

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return {
            "sweep": self.name,
            "run_id": self.run_id,
            "metric": self.metric,
            "protocol": self.identity,
            "winner": asdict(self.winner) if self.winner else None,
            "verdict": self.verdict(),
            "registered": self.registered,
            "report": self.report,
            "trials": [asdict(trial) for trial in self.trials],
            "refused": [asdict(entry) for entry in self.refused],
        }

    @property
    def scores(self) -> dict[str, Score]:
        """Combinations with a value by key, best first; those of which a seed is missing come last."""
        by_point: dict[str, list[TrialResult]] = {}
        for trial in self.trials:
            by_point.setdefault(trial.point, []).append(trial)
        found = {key: _score(members) for key, members in by_point.items()}
        whole = sorted(found.items(), key=lambda entry: (not entry[1].is_whole, entry[1].mean))
        return {key: score for key, score in whole if score.values}

    @property
    def ranked(self) -> list[TrialResult]:
        """Finished trials: the best combination first, and of each the best seed."""
        place = {key: number for number, key in enumerate(self.scores)}
        finished = (trial for trial in self.trials if trial.value is not None)
        return sorted(finished, key=lambda trial: (place[trial.point], trial.value or 0.0))

    @property
    def winner(self) -> TrialResult | None:
        """The best seed of the best combination, if any finished."""
        return next(iter(self.ranked), None)

    def verdict(self) -> str:
        """One sentence: who won, by how much, and whether that is more than chance."""
        return verdict(self.metric, list(self.scores.values()))

    def to_csv(self) -> str:
        """All trials, one a line."""
        others = list(dict.fromkeys(name for trial in self.trials for name in trial.knobs))
        plain = ["run", "run_id", "point", "seed", "status", "schedule", "T", "beta_start", "beta_end"]
        measured = ["value", "step", "images_seen", "images_per_second", "seconds", "error"]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*plain, *others, *measured, "sampled"])
        for trial in [*self.ranked, *self._without_value()]:
            row = [getattr(trial, name) for name in plain]
            row += [trial.knobs.get(name) for name in others]
            row += [getattr(trial, name) for name in measured]
            sampled = [{"knobs": dict(one.knobs), "value": one.value} for one in trial.sampled]
            writer.writerow([*row, json.dumps(sampled) if sampled else ""])
        return buffer.getvalue()

    def text(self) -> str:
        """The tables and the verdict."""
        header = ["schedule", "T", "betas", "other", "seed", self.metric, "images/s", "seconds"]
        lines = _table([header, *(_row(trial) for trial in [*self.ranked, *self._without_value()])])
        if any(len(score.values) > 1 for score in self.scores.values()):
            rows = [
                [score.words, f"{len(score.values)}/{score.num_trials}", score.value_words()]
                for score in self.scores.values()
            ]
            lines += ["", *_table([["combination", "seeds", f"mean {self.metric} and its standard error"], *rows])]
        lines += self._sampled()
        if self.refused:
            lines += ["", f"{len(self.refused)} combinations were refused before they started"]
            lines += [f"refused {entry.key}: {entry.reason}" for entry in self.refused[:_MOST_REFUSED]]
        lines += [f"failed {trial.run}: {trial.error}" for trial in self.trials if trial.status == "failed"]
        ends = [self.registered] if self.registered else []
        ends += [f"report: {self.report}"] if self.report else []
        return "\n".join(["", *lines, "", self.verdict(), *ends, f"sweep {self.name}", *self.ui])

    def _sampled(self) -> list[str]:
        rows = [
            [trial.words, str(trial.seed), _assignments(one.knobs), f"{one.value:.3f}", one.identity]
            for trial in self.ranked
            for one in sorted(trial.sampled, key=lambda one: one.value)
        ]
        header = ["without training again", "seed", "sampled with", self.metric, "protocol"]
        return ["", *_table([header, *rows])] if rows else []

    def _without_value(self) -> list[TrialResult]:
        return [trial for trial in self.trials if trial.value is None]


def _score(members: Sequence[TrialResult]) -> Score:
    return Score(
        words=members[0].words,
        schedule=members[0].schedule,
        values=[trial.value for trial in members if trial.value is not None],
        num_trials=len(members),
    )


def _row(trial: TrialResult) -> list[str]:
    return [
        trial.schedule,
        str(trial.T),
        "-" if trial.beta_start is None else f"{trial.beta_start:g}..{trial.beta_end:g}",
        _assignments(trial.knobs) or "-",
        str(trial.seed),
        f"{trial.status} at {trial.step:,}" if trial.value is None else f"{trial.value:.3f}",
        "-" if trial.images_per_second is None else f"{trial.images_per_second:,.0f}",
        "-" if trial.seconds is None else f"{trial.seconds:.0f}",
    ]


def _assignments(knobs: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={text}" for name, text in as_params(dict(knobs)).items())


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    kept = [n for n in range(len(rows[0])) if any(row[n] != "-" for row in rows[1:])] if len(rows) > 1 else []
    widths = {n: max(len(row[n]) for row in rows) for n in kept}
    return ["  ".join(row[n].ljust(widths[n]) for n in kept).rstrip() for row in rows]
