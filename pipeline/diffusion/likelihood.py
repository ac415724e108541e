"""Bits per dimension: the variational bound on the likelihood of images, term by term (DDPM, Sec. 3 and Eq. 5, 13).

    L = L_T + sum over t of L_{t-1},  L_T = KL(q(x_T | x_0) || N(0, I)),
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 1,  L_0 = -log p(x_0 | x_1)

All terms are in bits per dimension, float64. The network's arithmetic stays in the type of the images.
"""

import math

import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import predict_x_0, q_posterior, q_sample
from pipeline.diffusion.samplers import VARIANCES
from pipeline.diffusion.stepping import Denoiser, LimitX0, clip
from pipeline.errors import UserError

__all__ = ["bound_term", "discretized_log_likelihood", "prior_term", "stratified_timesteps"]

GREY_LEVEL = 2 / 255
"""Width of a grey level of images in [-1, 1]."""

_LEAST_PROBABILITY = 1e-12


def prior_term(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """L_T: what is left of an image in x_T.

        KL = (alpha_bar_T x_0^2 + (1 - alpha_bar_T) - 1 - log(1 - alpha_bar_T)) / 2

    Args:
        schedule: Noise schedule on the device of ``x_0``.
        x_0: Images, shape [B, C, H, W], in [-1, 1].

    Returns:
        Bits per dimension, float64 [B].
    """
    alpha_bar = schedule.alphas_cumprod[-1]
    nats = (alpha_bar * x_0.double().square() - alpha_bar - torch.log1p(-alpha_bar)) / 2
    return _bits(nats)


@torch.no_grad()
def bound_term(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    variance: str = "fixed-large",
    limit_x_0: LimitX0 | None = clip,
) -> Tensor:
    """The bound's term of one step for each image: L_{t-1} for the paper's t > 1, the decoder L_0 at its t = 1.

    Args:
        denoise: Predicts the noise in x_t.
        schedule: Noise schedule of the training, on the device of ``x_0``.
        x_0: Images, shape [B, C, H, W], on the 256 grey levels of [-1, 1].
        t: Steps, int64 [B], in [0, T); entry 0 is the decoder.
        eps: Standard normal noise, shape [B, C, H, W].
        variance: Of the reverse step, as in ``ancestral``.
        limit_x_0: Keeps the predicted x_0 in range, or None.

    Returns:
        Bits per dimension, float64 [B]: one draw of the term; its mean over ``eps`` is the term.

    Raises:
        UserError: ``variance`` has an unknown name.
    """
    if variance not in VARIANCES:
        raise UserError(f"unknown variance {variance!r}: use one of {', '.join(VARIANCES)}")
    small = variance == "fixed-small"
    log_variance = schedule.posterior_log_variance_clipped if small else schedule.fixed_large_log_variance
    x_t = q_sample(schedule, x_0, t, eps)
    x_0_hat = predict_x_0(schedule, x_t, t, denoise(x_t, t))
    if limit_x_0 is not None:
        x_0_hat = limit_x_0(x_0_hat)
    mean, _, _ = q_posterior(schedule, x_0.double(), x_t.double(), t)
    mean_hat, _, _ = q_posterior(schedule, x_0_hat.double(), x_t.double(), t)
    log_p = log_variance[t][:, None, None, None]
    log_q = schedule.posterior_log_variance_clipped[t][:, None, None, None]
    kl = _gaussian_kl(mean, log_q, mean_hat, log_p)
    decoder = -discretized_log_likelihood(x_0, mean_hat, (0.5 * log_p).exp())
    return torch.where(t == 0, _bits(decoder), _bits(kl))


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log probability of grey levels under a Gaussian cut into them: DDPM Eq. 13; the two ends take the tails.

    Args:
        x_0: Images on the 256 grey levels of [-1, 1], shape [B, C, H, W].
        mean: Of the Gaussian, float64 [B, C, H, W].
        std: Likewise, broadcasting against ``mean``.

    Returns:
        Nats, float64 [B, C, H, W], at least log(1e-12).
    """
    x = x_0.double()
    upper = torch.special.ndtr((x + GREY_LEVEL / 2 - mean) / std)
    lower = torch.special.ndtr((x - GREY_LEVEL / 2 - mean) / std)
    upper = torch.where(x > 1 - GREY_LEVEL / 2, 1.0, upper)
    lower = torch.where(x < -1 + GREY_LEVEL / 2, 0.0, lower)
    return (upper - lower).clamp(min=_LEAST_PROBABILITY).log()


def stratified_timesteps(uniform: Tensor, T: int, stride: int) -> tuple[Tensor, Tensor]:
    """Few steps an image whose weighted sum of terms has the whole sum as its mean.

    The decoder (step 0) always counts; the others are cut into runs of ``stride`` steps, of which one is drawn.

    Args:
        uniform: Uniform numbers in [0, 1), shape [B, k], k = ceil((T - 1) / stride): one for each image and run.
        T: Number of steps of the schedule.
        stride: Length of a run; 1 takes every step.

    Returns:
        Steps, int64 [B, k + 1], and the weight of each column, float64 [k + 1].
    """
    starts = torch.arange(1, T, stride)
    lengths = torch.minimum(torch.full_like(starts, stride), T - starts)
    assert uniform.ndim == 2, "uniform has one row an image"
    assert uniform.shape[1] == len(starts), f"uniform has {uniform.shape[1]} columns for {len(starts)} runs"
    drawn = starts + (uniform.double() * lengths).long()
    steps = torch.cat([torch.zeros(len(uniform), 1, dtype=torch.int64), drawn], dim=1)
    return steps, torch.cat([torch.ones(1, dtype=torch.float64), lengths.double()])


def _gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of Gaussians, nats in each dimension."""
    return 0.5 * (
        log_variance_p
        - log_variance_q
        - 1
        + (log_variance_q - log_variance_p).exp()
        + (mean_q - mean_p).square() * (-log_variance_p).exp()
    )


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
