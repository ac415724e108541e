"""From noise to images: samplers as functions of one signature, without any random number generator.

The caller hands in x_T and, step by step, the noise. So an image can be a function of its own seed alone, whichever
batch, worker or restart draws it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import per_image, predict_eps, predict_x_0, q_posterior
from pipeline.errors import UserError

__all__ = ["SAMPLERS", "VARIANCES", "Denoiser", "NoiseAt", "ancestral", "ddim", "sampling_timesteps"]

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t int64 [B]) -> eps_hat [B, C, H, W]."""

NoiseAt = Callable[[int], Tensor]
"""Index i of a sampling step, 0 for the noisiest -> standard normal noise [B, C, H, W], like x_T."""

VARIANCES: tuple[str, ...] = ("fixed-small", "fixed-large")


def sampling_timesteps(T: int, num_steps: int) -> list[int]:
    """Evenly spaced steps to sample at, noisiest first.

    Args:
        T: Number of steps of the schedule.
        num_steps: Number of network evaluations, in [1, T].

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


@torch.no_grad()
def ancestral(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    *,
    timesteps: Sequence[int],
    noise_at: NoiseAt,
    clip_x_0: bool = True,
    variance: str = "fixed-large",
) -> Tensor:
    """Walks the learned reverse chain: DDPM Alg. 2, with the schedule respaced to ``timesteps``.

        x_{t-1} = posterior_mean(x_0_hat, x_t) + sigma_t * noise,  no noise in the last step

    Args:
        denoise: Predicts the noise in x_t.
        schedule: Noise schedule of the training, on the device of ``x_T``.
        x_T: Standard normal noise, shape [B, C, H, W].
        timesteps: Strictly descending steps in [0, T), as ``sampling_timesteps`` gives them.
        noise_at: Noise of sampling step i; asked for i in [0, len(timesteps) - 1), never for the last step.
        clip_x_0: Clips the predicted x_0 to [-1, 1] at every step, as the paper's code does.
        variance: sigma_t^2: "fixed-small" is beta_tilde_t, "fixed-large" is beta_t (the paper's choice for CIFAR-10;
            with few steps fixed-small gives the better images).

    Returns:
        x_0, with the shape and dtype of ``x_T``.

    Raises:
        UserError: ``variance`` has an unknown name.
    """
    if variance not in VARIANCES:
        raise UserError(f"unknown variance {variance!r}: use one of {', '.join(VARIANCES)}")
    steps = _respaced(schedule, timesteps)
    small = variance == "fixed-small"
    log_variance = steps.posterior_log_variance_clipped if small else steps.fixed_large_log_variance
    x = x_T
    for i, t in enumerate(timesteps):
        k = _everywhere(steps.T - 1 - i, x)
        eps_hat = denoise(x, _everywhere(t, x))
        x_0 = _clipped(predict_x_0(steps, x, k, eps_hat), clip_x_0)
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
    clip_x_0: bool = True,
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
        timesteps: Strictly descending steps in [0, T), as ``sampling_timesteps`` gives them.
        noise_at: Noise of sampling step i; asked for i in [0, len(timesteps) - 1), and only if ``eta`` is not 0.
        clip_x_0: Clips the predicted x_0 to [-1, 1] at every step and takes the noise that fits the clipped x_0.
        eta: 0 is deterministic, 1 equals ``ancestral`` with the fixed-small variance; in [0, 1].

    Returns:
        x_0, with the shape and dtype of ``x_T``.

    Raises:
        UserError: ``eta`` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta}: use a value in [0, 1]; 0 adds no noise, 1 as much as DDPM")
    steps = _respaced(schedule, timesteps)
    alpha_bar_next = steps.alphas_cumprod_prev
    sigma = eta * steps.posterior_variance.sqrt()  # DDIM Eq. 16
    direction = (1 - alpha_bar_next - sigma.square()).clamp(min=0).sqrt()
    x = x_T
    for i, t in enumerate(timesteps):
        k = _everywhere(steps.T - 1 - i, x)
        eps_hat = denoise(x, _everywhere(t, x))
        x_0 = _clipped(predict_x_0(steps, x, k, eps_hat), clip_x_0)
        if clip_x_0:
            eps_hat = predict_eps(steps, x, k, x_0)
        x = per_image(alpha_bar_next[k].sqrt(), x) * x_0 + per_image(direction[k], x) * eps_hat
        if eta > 0 and i < steps.T - 1:
            x = x + per_image(sigma[k], x) * noise_at(i)
    return x


SAMPLERS: Mapping[str, Callable[..., Tensor]] = {"ddpm": ancestral, "ddim": ddim}


def _respaced(schedule: NoiseSchedule, timesteps: Sequence[int]) -> NoiseSchedule:
    ascending = list(reversed(timesteps))
    assert ascending == sorted(set(ascending)), "timesteps must be strictly descending"
    assert ascending, "timesteps must not be empty"
    assert 0 <= ascending[0] <= ascending[-1] < schedule.T, f"timesteps must be in [0, {schedule.T})"
    return schedule.respaced(ascending)


def _everywhere(t: int, x: Tensor) -> Tensor:
    """The same step for each image: int64 [B] on the device of ``x``."""
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


def _clipped(x_0: Tensor, clip: bool) -> Tensor:
    return x_0.clamp(-1, 1) if clip else x_0
