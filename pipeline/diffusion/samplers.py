"""From noise to images: samplers as functions of one signature, without any random number generator.

The caller hands in x_T and, step by step, the noise. So an image can be a function of its own seed alone, whichever
batch, worker or restart draws it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import per_image, q_posterior
from pipeline.diffusion.solvers import dpm_solver_pp_2m, heun
from pipeline.diffusion.stepping import Denoiser, LimitX0, NoiseAt, clip, denoised, everywhere, respaced
from pipeline.errors import UserError

__all__ = ["SAMPLERS", "VARIANCES", "ancestral", "ddim"]

VARIANCES: tuple[str, ...] = ("fixed-small", "fixed-large")


@torch.no_grad()
def ancestral(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    *,
    timesteps: Sequence[int],
    noise_at: NoiseAt,
    limit_x_0: LimitX0 | None = clip,
    variance: str = "fixed-large",
) -> Tensor:
    """Walks the learned reverse chain: DDPM Alg. 2, with the schedule respaced to ``timesteps``.

        x_{t-1} = posterior_mean(x_0_hat, x_t) + sigma_t * noise,  no noise in the last step

    Args:
        denoise: Predicts the noise in x_t.
        schedule: Noise schedule of the training, on the device of ``x_T``.
        x_T: Standard normal noise, shape [B, C, H, W].
        timesteps: Strictly descending steps in [0, T), as ``spaced_timesteps`` gives them.
        noise_at: Noise of sampling step i; asked for i in [0, len(timesteps) - 1), never for the last step.
        limit_x_0: Keeps the predicted x_0 in range at every step, or None; ``clip`` is what the paper's code does.
        variance: sigma_t^2: "fixed-small" is beta_tilde_t, "fixed-large" is beta_t (the paper's choice for CIFAR-10;
            with few steps fixed-small gives the better images).

    Returns:
        x_0, with the shape and dtype of ``x_T``.

    Raises:
        UserError: ``variance`` has an unknown name.
    """
    if variance not in VARIANCES:
        raise UserError(f"unknown variance {variance!r}: use one of {', '.join(VARIANCES)}")
    steps = respaced(schedule, timesteps)
    small = variance == "fixed-small"
    log_variance = steps.posterior_log_variance_clipped if small else steps.fixed_large_log_variance
    x = x_T
    for i, t in enumerate(timesteps):
        k = everywhere(steps.T - 1 - i, x)
        x_0, _ = denoised(denoise, steps, x, t, k, limit_x_0)
        x, _, _ = q_posterior(steps, x_0, x, k)
        if i < steps.T - 1:
            x = x + per_image((0.5 * log_variance[k]).exp(), x) * noise_at(i)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    *,
    timesteps: Sequence[int],
    noise_at: NoiseAt,
    limit_x_0: LimitX0 | None = clip,
    eta: float = 0.0,
) -> Tensor:
    """Jumps along ``timesteps`` with as much fresh noise as ``eta`` says: DDIM Eq. 12 and 16.

        x_s = sqrt(alpha_bar_s) * x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) * eps_hat + sigma * noise
        sigma^2 = eta^2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)

    where s is the element after t in ``timesteps``; after the last one comes x_0 itself, with alpha_bar = 1.

    Args:
        denoise: Predicts the noise in x_t.
        schedule: Noise schedule of the training, on the device of ``x_T``.
        x_T: Standard normal noise, shape [B, C, H, W].
        timesteps: Strictly descending steps in [0, T), as ``spaced_timesteps`` gives them.
        noise_at: Noise of sampling step i; asked for i in [0, len(timesteps) - 1), and only if ``eta`` is not 0.
        limit_x_0: Keeps the predicted x_0 in range, or None; the noise is the one that fits the limited x_0.
        eta: 0 is deterministic, 1 equals ``ancestral`` with the fixed-small variance; in [0, 1].

    Returns:
        x_0, with the shape and dtype of ``x_T``.

    Raises:
        UserError: ``eta`` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta}: use a value in [0, 1]; 0 adds no noise, 1 as much as DDPM")
    steps = respaced(schedule, timesteps)
    alpha_bar_next = steps.alphas_cumprod_prev
    sigma = eta * steps.posterior_variance.sqrt()  # DDIM Eq. 16
    direction = (1 - alpha_bar_next - sigma.square()).clamp(min=0).sqrt()
    x = x_T
    for i, t in enumerate(timesteps):
        k = everywhere(steps.T - 1 - i, x)
        x_0, eps_hat = denoised(denoise, steps, x, t, k, limit_x_0)
        x = per_image(alpha_bar_next[k].sqrt(), x) * x_0 + per_image(direction[k], x) * eps_hat
        if eta > 0 and i < steps.T - 1:
            x = x + per_image(sigma[k], x) * noise_at(i)
    return x


SAMPLERS: Mapping[str, Callable[..., Tensor]] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "dpm-solver++": dpm_solver_pp_2m,
    "heun": heun,
}
"""Sampler by the name that ``--sampler`` takes; all are called alike, options apart."""
