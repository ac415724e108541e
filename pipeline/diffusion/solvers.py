"""Solvers of second order for the probability-flow ODE, in the signature of ``samplers``: no noise but x_T.

Both evaluate the network at the schedule's own integer steps alone, where it was trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import per_image
from pipeline.diffusion.stepping import Denoiser, LimitX0, NoiseAt, clip, denoised, everywhere, respaced

__all__ = ["dpm_solver_pp_2m", "heun", "heun_grid"]


@torch.no_grad()
def dpm_solver_pp_2m(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    *,
    timesteps: Sequence[int],
    noise_at: NoiseAt | None = None,
    limit_x_0: LimitX0 | None = clip,
) -> Tensor:
    """DPM-Solver++(2M): second order by remembering the previous prediction of x_0; 2211.01095, Alg. 2.

        x_s = sigma_s / sigma_t * x_t - alpha_s * (exp(-h) - 1) * D,   h = lambda_s - lambda_t
        D = (1 + 1 / (2 r)) * x_0_hat - 1 / (2 r) * previous x_0_hat,  r = previous h / h

    with alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma). The first step has no
    predecessor and the last one (to lambda = infinity) no finite h: there D = x_0_hat, the first-order step.

    Args:
        denoise: Predicts the noise in x_t.
        schedule: Noise schedule of the training, on the device of ``x_T``.
        x_T: Standard normal noise, shape [B, C, H, W].
        timesteps: Strictly descending steps in [0, T); one network evaluation each.
        noise_at: Never asked.
        limit_x_0: Keeps the predicted x_0 in range, or None.

    Returns:
        x_0, with the shape and dtype of ``x_T``.
    """
    steps = respaced(schedule, timesteps)
    alpha, sigma = steps.alphas_cumprod.sqrt(), (1 - steps.alphas_cumprod).sqrt()
    lambdas = (alpha / sigma).log()
    x, before = x_T, x_T
    for i, t in enumerate(timesteps[:-1]):
        k = steps.T - 1 - i
        x_0, _ = denoised(denoise, steps, x, t, everywhere(k, x), limit_x_0)
        h = lambdas[k - 1] - lambdas[k]
        D = x_0
        if i > 0:
            gain = h / (lambdas[k] - lambdas[k + 1]) / 2  # 1 / (2 r)
            D = _scaled(1 + gain, x_0) - _scaled(gain, before)
        x = _scaled(sigma[k - 1] / sigma[k], x) - _scaled(alpha[k - 1] * torch.expm1(-h), D)
        before = x_0
    x_0, _ = denoised(denoise, steps, x, timesteps[-1], everywhere(0, x), limit_x_0)
    return x_0


@torch.no_grad()
def heun(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    *,
    timesteps: Sequence[int],
    noise_at: NoiseAt | None = None,
    limit_x_0: LimitX0 | None = clip,
    num_corrected: int | None = None,
) -> Tensor:
    """Heun's method in sigma = sqrt((1 - alpha_bar) / alpha_bar) without churn: EDM (2206.00364), Alg. 1.

    With z = x / sqrt(alpha_bar) the model is EDM's: dz/dsigma = eps_hat. A step goes to z' by Euler, asks the network
    there, and is done again with the mean of both slopes; the last step, to sigma = 0, stays Euler's.

    Args:
        denoise: Predicts the noise in x_t.
        schedule: Noise schedule of the training, on the device of ``x_T``.
        x_T: Standard normal noise, shape [B, C, H, W].
        timesteps: Strictly descending steps in [0, T), best evenly spaced in log-SNR; one network evaluation each, and
            another one for each corrected step.
        noise_at: Never asked.
        limit_x_0: Keeps the predicted x_0 in range, or None.
        num_corrected: How many steps, counted from the first, are corrected; default: all but the last.

    Returns:
        x_0, with the shape and dtype of ``x_T``.
    """
    steps = respaced(schedule, timesteps)
    most = steps.T - 1
    num_corrected = most if num_corrected is None else num_corrected
    assert 0 <= num_corrected <= most, f"num_corrected must be in [0, {most}]"
    alpha_bar = steps.alphas_cumprod
    alpha, sigma = alpha_bar.sqrt(), ((1 - alpha_bar) / alpha_bar).sqrt()
    x = x_T
    for i, t in enumerate(timesteps[:-1]):
        k = steps.T - 1 - i
        scale, change = alpha[k - 1] / alpha[k], alpha[k - 1] * (sigma[k - 1] - sigma[k])
        _, slope = denoised(denoise, steps, x, t, everywhere(k, x), limit_x_0)
        if i < num_corrected:
            euler = _scaled(scale, x) + _scaled(change, slope)
            _, there = denoised(denoise, steps, euler, timesteps[i + 1], everywhere(k - 1, x), limit_x_0)
            slope = (slope + there) / 2
        x = _scaled(scale, x) + _scaled(change, slope)
    x_0, _ = denoised(denoise, steps, x, timesteps[-1], everywhere(0, x), limit_x_0)
    return x_0


def heun_grid(num_evaluations: int) -> tuple[int, int]:
    """How ``heun`` spends exactly so many network evaluations.

    Returns:
        Number of timesteps, and how many steps are corrected: all but the last if ``num_evaluations`` is odd, all but
        the last two if it is even.
    """
    return num_evaluations // 2 + 1, (num_evaluations - 1) // 2


def _scaled(coefficient: Tensor, x: Tensor) -> Tensor:
    """One finished coefficient, float64 [], for all images."""
    return per_image(coefficient[None], x) * x
