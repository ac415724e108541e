"""The trials of a sweep: every combination that makes a sound schedule, the others named and counted."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import TrainConfig, TuneConfig, override
from pipeline.errors import UserError
from pipeline.generation import check_sampling
from pipeline.model_folder import build_schedule

__all__ = ["Refused", "Trial", "search_space"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the space."""

    key: str
    """Names the trial within its sweep."""
    knobs: dict[str, Any]
    """What it changes in the sweep's base config, by leaf name."""

    def config(self, base: TrainConfig, sweep: str) -> TrainConfig:
        """The trial's training run."""
        return replace(override(base, self.knobs), name=f"{sweep}-{self.key}")


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A combination that would not make a sound schedule, and why."""

    key: str
    reason: str


def search_space(config: TuneConfig) -> tuple[list[Trial], list[Refused]]:
    """All combinations of schedule, T and beta range; cosine has no beta range and appears once for each T.

    Raises:
        UserError: No combination is left.
    """
    trials: dict[str, Trial] = {}
    refused: dict[str, Refused] = {}
    for schedule, T, text in itertools.product(config.schedules, config.Ts, config.beta_ranges):
        trial = _trial(schedule, T, config.parse_beta_range(text))
        try:
            trained = override(config.base, trial.knobs)
            build_schedule(trained.diffusion)
            check_sampling(trained.sampling, trained)
        except UserError as error:
            refused[trial.key] = Refused(key=trial.key, reason=str(error))
        else:
            trials[trial.key] = trial
    if not trials:
        reasons = "; ".join(f"{entry.key}: {entry.reason}" for entry in refused.values())
        raise UserError(f"the sweep has no trial left: {reasons}")
    return list(trials.values()), list(refused.values())


def _trial(schedule: str, T: int, beta_range: tuple[float, float]) -> Trial:
    knobs: dict[str, Any] = {"schedule": schedule, "T": T}
    key = f"{schedule}-T{T}"
    if schedule != "cosine":
        knobs |= {"beta_start": beta_range[0], "beta_end": beta_range[1]}
        key += f"-beta{beta_range[0]:g}-{beta_range[1]:g}"
    return Trial(key=key, knobs=knobs)
