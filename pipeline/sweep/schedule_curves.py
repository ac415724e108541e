"""The noise schedules of a sweep's trials as curves over t / T."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import ScheduleConfig, from_flat, to_flat
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.errors import UserError
from pipeline.model_folder import build_schedule

__all__ = ["ScheduleCurve", "schedule_curve"]

_MOST_POINTS = 120


@dataclass(frozen=True, kw_only=True)
class ScheduleCurve:
    """alpha_bar_t and log-SNR of a schedule."""

    u: Sequence[float]
    """t / T with the paper's t in 1..T, ascending, in (0, 1]."""
    alpha_bar: Sequence[float]
    """In (0, 1)."""
    log_snr: Sequence[float]
    """ln(alpha_bar / (1 - alpha_bar))."""


def schedule_curve(params: Mapping[str, str]) -> ScheduleCurve | None:
    """The curves of a run's schedule, of at most about 120 points; None if the params describe none.

    Args:
        params: A run's config as MLflow keeps it.
    """
    known = to_flat(ScheduleConfig())
    given = {name: text if name == "schedule" else _number(text) for name, text in params.items() if name in known}
    try:
        # Such a schedule was trained, if it was asked for; here it is only drawn.
        schedule = build_schedule(from_flat(ScheduleConfig, given | {"allow_signal_at_T": True}))
    except (UserError, TypeError, ValueError):
        return None
    return _curve(schedule)


def _curve(schedule: NoiseSchedule) -> ScheduleCurve:
    T = schedule.T
    stride = max(1, T // _MOST_POINTS)
    steps = sorted({*range(0, T, stride), T - 1})
    return ScheduleCurve(
        u=[(step + 1) / T for step in steps],
        alpha_bar=schedule.alphas_cumprod[steps].tolist(),
        log_snr=schedule.snr[steps].log().tolist(),
    )


def _number(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
