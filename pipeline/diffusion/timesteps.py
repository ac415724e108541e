"""Which steps of the schedule a sampler visits: distinct, descending, from T - 1 to 0 for every number of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.errors import UserError

__all__ = ["SPACINGS", "sampling_timesteps", "spaced_timesteps"]


def sampling_timesteps(T: int, num_steps: int) -> list[int]:
    """Evenly spaced steps to sample at, noisiest first.

    Args:
        T: Number of steps of the schedule.
        num_steps: Number of steps to visit, in [1, T].

    Returns:
        ``num_steps`` distinct descending steps that start at T - 1 and, from two steps on, end at 0.

    Raises:
        UserError: ``num_steps`` is not in [1, T].
    """
    if not 1 <= num_steps <= T:
        raise UserError(f"num_steps={num_steps} with T={T}: a sampler takes between 1 and T steps")
    gaps = num_steps - 1
    if gaps == 0:
        return [T - 1]
    # Rounded in whole numbers; gaps are at least 1 wide, so no two steps can round to the same one.
    return [(i * (T - 1) + gaps // 2) // gaps for i in reversed(range(num_steps))]


def spaced_timesteps(schedule: NoiseSchedule, num_steps: int, spacing: str = "uniform") -> list[int]:
    """Steps to sample at by the name of their spacing, noisiest first.

        uniform    t_i = u_i * (T - 1),      u_i = i / (num_steps - 1)
        quadratic  t_i = u_i^2 * (T - 1)     DDIM, App. D.2: more steps where little noise is left
        logsnr     log(alpha_bar / (1 - alpha_bar)) grows by equal amounts: DPM-Solver (2206.00927), Sec. 3.3

    each rounded to a whole step. Where two would fall on the same step, they take the nearest free ones.

    Args:
        schedule: Noise schedule of the training.
        num_steps: Number of steps to visit, in [1, T].
        spacing: One of ``SPACINGS``.

    Returns:
        As ``sampling_timesteps``.

    Raises:
        UserError: ``num_steps`` is not in [1, T], or the spacing has an unknown name.
    """
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
    T = schedule.T
    evenly = sampling_timesteps(T, num_steps)
    if spacing == "uniform" or num_steps <= 2:
        return evenly
    wanted = SPACINGS[spacing](schedule, torch.linspace(0, 1, num_steps, dtype=torch.float64))
    ascending = _distinct([round(position) for position in wanted.tolist()], T)
    return ascending[::-1]


def _quadratic(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    return u.square() * (schedule.T - 1)


def _log_snr(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    log_snr = schedule.snr.log().cpu()  # descending in t
    target = log_snr[0] + u * (log_snr[-1] - log_snr[0])
    right = torch.searchsorted(-log_snr, -target).clamp(1, schedule.T - 1)
    before, after = log_snr[right - 1], log_snr[right]
    return right - 1 + (before - target) / (before - after)


SPACINGS: Mapping[str, Callable[[NoiseSchedule, Tensor], Tensor]] = {
    "uniform": lambda schedule, u: u * (schedule.T - 1),
    "quadratic": _quadratic,
    "logsnr": _log_snr,
}
"""Spacing by name: (schedule, u ascending from 0 to 1) -> steps as real numbers, ascending from 0 to T - 1."""


def _distinct(ascending: list[int], T: int) -> list[int]:
    """Moves equal steps apart, first upwards, then down from the end, which stays T - 1."""
    for i in range(1, len(ascending)):
        ascending[i] = max(ascending[i], ascending[i - 1] + 1)
    for i in range(len(ascending)):
        ascending[i] = min(ascending[i], T - len(ascending) + i)
    return ascending
