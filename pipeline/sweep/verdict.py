"""Which combination won, and whether by more than the seeds' spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Comparison", "Score", "compare", "verdict"]

SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a combination is worth: the objective of its seeds."""

    words: str
    schedule: str
    values: Sequence[float]
    """Of the seeds that finished."""
    num_trials: int
    """Seeds that were to finish."""

    @property
    def is_whole(self) -> bool:
        """Whether every seed finished: of those that early stopping lets through only the better ones are known."""
        return 0 < len(self.values) == self.num_trials

    @property
    def mean(self) -> float:
        """The mean over the seeds; inf without one."""
        return fmean(self.values) if self.values else math.inf

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None for a single seed."""
        return stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    def value_words(self) -> str:
        """The mean with its standard error."""
        error = self.standard_error
        return f"{self.mean:.3f}" if error is None else f"{self.mean:.3f} ± {error:.3f}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Welch's test of two means whose spreads differ."""

    t: float
    """The difference in units of its standard error."""
    p: float
    """Chance of such a difference, or a larger one, if there were none."""


def compare(better: Score, worse: Score) -> Comparison | None:
    """Compares two combinations; None if one of them has a single seed.

    Common random numbers make runs of one seed alike; the test does not use that, which errs on the side of caution.
    """
    from scipy.stats import t as student  # type: ignore[import-untyped]  # 0.5 s to import, needed once at the end

    if better.standard_error is None or worse.standard_error is None:
        return None
    parts = [(score.standard_error or 0.0) ** 2 for score in (better, worse)]
    gap = worse.mean - better.mean
    if sum(parts) == 0:
        return Comparison(t=math.inf if gap else 0.0, p=0.0 if gap else 1.0)
    t = gap / math.sqrt(sum(parts))
    # Welch-Satterthwaite
    spread = sum(part**2 / (len(score.values) - 1) for part, score in zip(parts, (better, worse), strict=True))
    degrees = sum(parts) ** 2 / spread
    return Comparison(t=t, p=float(2 * student.sf(abs(t), degrees)))


def verdict(metric: str, ranked: Sequence[Score]) -> str:
    """One sentence.

    Args:
        metric: The objective's name.
        ranked: Combinations with a value, best first.
    """
    if not ranked:
        return "no trial finished"
    best = ranked[0]
    of_seeds = f" (mean and standard error of {len(best.values)} seeds)" if len(best.values) > 1 else ""
    value = f"{metric} {best.value_words()}{of_seeds}"
    if len(ranked) == 1:
        return f"{best.words} won with {value}; no other trial finished"
    second = ranked[1]
    gap = second.mean - best.mean
    ahead = f"{gap:.3f} ({gap / second.mean if second.mean else 0.0:.1%}) ahead of {second.words}"
    found = compare(best, second)
    if found is None:
        return f"{best.words} won with {value}, {ahead}; one seed each, so a small lead may be chance{_other(ranked)}"
    test = f"(Welch t = {found.t:.2f}, p = {found.p:.2g})"
    if found.p < SIGNIFICANT:
        return f"{best.words} won with {value}, {ahead}, more than the seeds' spread explains {test}{_other(ranked)}"
    return (
        f"no winner: {best.words} has the smallest {value}, {ahead}, but that is within the seeds' spread {test}"
        f"{_other(ranked)}"
    )


def _other(ranked: Sequence[Score]) -> str:
    """The best of another schedule, where that is not the second already."""
    best, second = ranked[:2]
    if second.schedule != best.schedule:
        return ""
    other = next((score for score in ranked if score.schedule != best.schedule), None)
    return f"; the best of another schedule, {other.words}, is {other.mean - best.mean:.3f} behind" if other else ""
