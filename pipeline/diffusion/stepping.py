"""What every sampler is made of: who predicts, where the noise comes from, how a predicted x_0 is kept in range."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import predict_eps, predict_x_0

__all__ = [
    "Denoiser",
    "LimitX0",
    "NoiseAt",
    "clip",
    "denoised",
    "dynamic_threshold",
    "everywhere",
    "respaced",
]

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t int64 [B]) -> eps_hat [B, C, H, W]."""

NoiseAt = Callable[[int], Tensor]
"""Index i of a sampling step, 0 for the noisiest -> standard normal noise [B, C, H, W], like x_T."""

LimitX0 = Callable[[Tensor], Tensor]
"""Predicted x_0 [B, C, H, W] -> x_0 in the range of images."""


def clip(x_0: Tensor) -> Tensor:
    """Cuts off what is outside [-1, 1], as the DDPM paper's code does at every step."""
    return x_0.clamp(-1, 1)


def dynamic_threshold(percentile: float) -> LimitX0:
    """Scales an image into range where much of it is outside: dynamic thresholding, Imagen (2205.11487), Sec. 2.3.

        s = max(1, the percentile of |x_0| over the image);  x_0 := clip(x_0, -s, s) / s

    Large guidance weights push predictions out of range; clipping would saturate them.

    Args:
        percentile: Part of an image's values that s must cover, in (0, 1].
    """

    def limit(x_0: Tensor) -> Tensor:
        sizes = x_0.abs().flatten(1)
        # kthvalue, not quantile: that one refuses half precision and large images.
        rank = min(max(1, round(percentile * sizes.shape[1])), sizes.shape[1])
        s = sizes.kthvalue(rank, dim=1).values.clamp(min=1)[:, None, None, None]
        return x_0.clamp(-s, s) / s

    return limit


def denoised(
    denoise: Denoiser, steps: NoiseSchedule, x: Tensor, t: int, k: Tensor, limit_x_0: LimitX0 | None
) -> tuple[Tensor, Tensor]:
    """One evaluation of the network, in both forms.

    Args:
        denoise: Predicts the noise in x_t.
        steps: The respaced schedule.
        x: Images at this step, shape [B, C, H, W].
        t: The step as the network counts it.
        k: The step as ``steps`` counts it, int64 [B].
        limit_x_0: Keeps x_0 in range, or None.

    Returns:
        x_0_hat, limited, and the eps_hat that fits it.
    """
    eps_hat = denoise(x, everywhere(t, x))
    x_0 = predict_x_0(steps, x, k, eps_hat)
    if limit_x_0 is None:
        return x_0, eps_hat
    x_0 = limit_x_0(x_0)
    return x_0, predict_eps(steps, x, k, x_0)


def respaced(schedule: NoiseSchedule, timesteps: Sequence[int]) -> NoiseSchedule:
    """The schedule of the visited steps alone; its last entry is the noisiest.

    Args:
        schedule: Noise schedule of the training.
        timesteps: Strictly descending steps in [0, T).
    """
    ascending = list(reversed(timesteps))
    assert ascending == sorted(set(ascending)), "timesteps must be strictly descending"
    assert ascending, "timesteps must not be empty"
    assert 0 <= ascending[0] <= ascending[-1] < schedule.T, f"timesteps must be in [0, {schedule.T})"
    return schedule.respaced(ascending)


def everywhere(t: int, x: Tensor) -> Tensor:
    """The same step for each image: int64 [B] on the device of ``x``."""
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
