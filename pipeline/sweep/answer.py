"""The answer of a sweep in numbers and words: trials, their seeds, and what a report says of them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pipeline.sweep.report_commands import Command

__all__ = ["BETAS", "FIRST", "Points", "SampledResult", "SeedRun", "Sheet", "Status", "SweepReport", "TrialReport"]
__all__ += ["describe", "short"]

Status = Literal["finished", "stopped", "failed", "running"]
Points = Sequence[tuple[int, float]]
"""Values by step, in the order of the steps."""

BETAS = ("beta_start", "beta_end")
FIRST = ("schedule", "T", *BETAS)
"""Knobs that are told before all others."""

_MOST_CHARACTERS = 32
"""Trials described in more words than this are labelled by their place."""


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One training run of a trial."""

    run: str
    run_id: str
    seed: int
    status: Status
    error: str = ""
    value: float | None = None
    """The objective after the last step; only finished runs have one, since others saw fewer images."""
    curve: Points = ()
    """The objective by step."""
    rungs: Points = ()
    """The objective on fewer images, by which runs are stopped early: not comparable with ``curve``."""
    seconds: float | None = None
    images: float | None = None
    """Training images seen."""

    @property
    def last_step(self) -> int | None:
        """The last step that was measured."""
        return max((step for step, _ in (*self.curve, *self.rungs)), default=None)


@dataclass(frozen=True, kw_only=True)
class TrialReport:
    """One point of the search space, with a run for each seed."""

    key: str
    knobs: Mapping[str, Any]
    """What was searched and counts for this trial: a cosine trial has no beta range."""
    runs: Sequence[SeedRun]
    params: Mapping[str, str] = field(default_factory=dict)
    """Config of its first run."""

    @cached_property
    def values(self) -> list[float]:
        """The objective of each finished seed."""
        return [run.value for run in self.runs if run.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean over finished seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; one seed has none."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    @property
    def status(self) -> Status:
        """Of its seeds the best: one that has finished is enough for a mean."""
        return min((run.status for run in self.runs), key=("finished", "running", "stopped", "failed").index)

    @property
    def words(self) -> str:
        """The point in words."""
        return describe(self.knobs)


@dataclass(frozen=True, kw_only=True)
class SampledResult:
    """A result of the sampling search: a trained model under other sampling knobs."""

    trial: str
    seed: int
    knobs: Mapping[str, Any]
    value: float
    identity: str
    """Of its protocol."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Samples of a trial."""

    trial: TrialReport
    run: SeedRun
    step: int
    png: bytes


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """A sweep and its answer."""

    name: str
    run_id: str
    experiment: str
    status: str
    """Of the parent run, in MLflow's words."""
    metric: str
    """The objective; smaller is better."""
    verdict: str
    identity: str
    protocol: Mapping[str, Any]
    trials: Sequence[TrialReport]
    """The best first, then those without a value."""
    refused: Sequence[tuple[str, str]] = ()
    """Combinations that were never tried, and why."""
    sampled: Sequence[SampledResult] = ()
    best_sheet: Sheet | None = None
    worst_sheet: Sheet | None = None
    csv: str = ""
    csv_location: str = ""
    commands: Sequence[Command] = ()

    @property
    def ranked(self) -> list[TrialReport]:
        """Trials that have a value, the best first."""
        return [trial for trial in self.trials if trial.mean is not None]

    @property
    def num_seeds(self) -> int:
        """Most seeds of a trial."""
        return max((len(trial.runs) for trial in self.trials), default=0)

    def varying(self) -> list[str]:
        """Knobs that have more than one value among the trials, schedule and T first."""
        names = dict.fromkeys([*FIRST, *(name for trial in self.trials for name in trial.knobs)])
        return [
            name for name in names if len({str(trial.knobs[name]) for trial in self.trials if name in trial.knobs}) > 1
        ]

    def label(self, trial: TrialReport) -> str:
        """A trial in few words: its place in the table and its schedule, where all of its knobs would be too long."""
        if max(len(each.words) for each in self.trials) <= _MOST_CHARACTERS:
            return trial.words
        place = f"#{self.ranked.index(trial) + 1} " if trial in self.ranked else ""
        return place + describe({name: trial.knobs[name] for name in ("schedule", "T") if name in trial.knobs})

    def sampled_knobs(self) -> list[str]:
        """Knobs of the sampling search."""
        return list(dict.fromkeys(name for result in self.sampled for name in result.knobs))


def describe(knobs: Mapping[str, Any]) -> str:
    """A point of the space in words: ``linear T=100 beta 1e-4:0.02 lr=0.001``."""
    rest = dict(knobs)
    words = [str(rest.pop("schedule"))] if "schedule" in rest else []
    words += [f"T={rest.pop('T')}"] if "T" in rest else []
    if rest.keys() >= {*BETAS}:
        betas = f"{short(rest.pop('beta_start'))}:{short(rest.pop('beta_end'))}"
        words.append(f"\N{GREEK SMALL LETTER BETA}\N{NO-BREAK SPACE}{betas}")
    return " ".join([*words, *(f"{name}={short(value)}" for name, value in rest.items())]) or "base config"


def short(value: Any) -> str:
    """A knob's value in few characters."""
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e6:
            mantissa, _, exponent = f"{value:.2e}".partition("e")
            # No line may break after a minus sign, as it may after a hyphen.
            return f"{float(mantissa):g}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
        return f"{value:.4g}"
    return " ".join(map(short, value)) if isinstance(value, list) else str(value)
