"""Walks from noise to images that are looked at on the way, and that share a part of the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline import draws
from pipeline.config import SamplingConfig
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import predict_x_0, q_sample
from pipeline.diffusion.samplers import ancestral, ddim
from pipeline.diffusion.stepping import Denoiser, NoiseAt, everywhere
from pipeline.diffusion.timesteps import spaced_timesteps
from pipeline.generation import limit_of, sample

__all__ = ["Look", "evenly", "finish", "interpolated", "shared_noise", "walk"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a walk held at one evaluation of the network."""

    t: int
    """The step, in [0, T)."""
    x_t: Tensor
    """The noisy images, [B, C, H, W]."""
    x_0: Tensor
    """The clean images that the network predicts from them, [B, C, H, W]."""


@torch.inference_mode()
def walk(
    denoise: Denoiser, schedule: NoiseSchedule, config: SamplingConfig, shape: tuple[int, int, int, int]
) -> tuple[list[Look], Tensor]:
    """The walk of an evaluation's first images, chunk 0, with a look at every step.

    Args:
        denoise: The network as samplers call it, for ``shape[0]`` images.
        schedule: The schedule of its training.
        config: Sampler and seed.
        shape: [B, C, H, W].

    Returns:
        A look for each step that was visited, noisiest first, and x_0.
    """
    looks: list[Look] = []
    limit, device = limit_of(config), schedule.betas.device

    def watched(x_t: Tensor, t: Tensor) -> Tensor:
        eps_hat = denoise(x_t, t)
        x_0 = predict_x_0(schedule, x_t, t, eps_hat)
        if not looks or int(t[0]) < looks[-1].t:  # samplers of second order evaluate a step twice
            looks.append(Look(t=int(t[0]), x_t=x_t, x_0=x_0 if limit is None else limit(x_0)))
        return eps_hat

    def noise_at(index: int) -> Tensor:
        return draws.standard_normal(shape, config.sample_seed, draws.Purpose.SAMPLE_STEP, 0, index).to(device)

    x_T = draws.standard_normal(shape, config.sample_seed, draws.Purpose.SAMPLE, 0).to(device)
    return looks, sample(watched, schedule, config, x_T, noise_at)


@torch.inference_mode()
def finish(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    config: SamplingConfig,
    x_t: Tensor,
    t: int,
    noise_at: NoiseAt,
    *,
    is_ancestral: bool,
) -> Tensor:
    """Walks from step ``t`` to x_0, over the steps of ``config`` that lie below ``t``.

    Args:
        denoise: The network as samplers call it.
        schedule: The schedule of its training.
        config: Number of steps, their spacing, variance or eta, and clipping.
        x_t: Images at step ``t``, [B, C, H, W].
        t: In [0, T).
        noise_at: Noise of the step with this index, 0 for the noisiest.
        is_ancestral: By DDPM's chain (Alg. 2), which draws noise in every step; else by DDIM (Eq. 12).
    """
    below = [step for step in spaced_timesteps(schedule, config.sampling_steps, config.spacing) if step < t]
    go = partial(ancestral, variance=config.variance) if is_ancestral else partial(ddim, eta=config.eta)
    return go(denoise, schedule, x_t, timesteps=[t, *below], noise_at=noise_at, limit_x_0=limit_of(config))


def shared_noise(shape: Sequence[int], seed: int, device: torch.device, *, row: int) -> NoiseAt:
    """Noise of each step that all images of a row of pictures have in common, [1, C, H, W]."""
    one = (1, *shape[1:])
    return lambda index: draws.standard_normal(one, seed, draws.Purpose.SHOW_STEP, row, index).to(device)


def interpolated(schedule: NoiseSchedule, ends: Tensor, eps: Tensor, shares: Sequence[float], t: int) -> Tensor:
    """Mixes of two images at step ``t``: DDPM Sec. 4.3, Fig. 8, with the noise kept at its level.

        x_t(s) = sqrt(alpha_bar_t) ((1 - s) a + s b) + sqrt(1 - alpha_bar_t) ((1 - s) eps_a + s eps_b) / |(1 - s, s)|

    The paper mixes noise like images. That makes it weaker half-way than at any step t the network was trained for, and
    the images blurred; dividing by the length of (1 - s, s) gives it variance 1 again.

    Args:
        schedule: Noise schedule on the device of ``ends``.
        ends: The two images, [2, C, H, W], in [-1, 1].
        eps: Their noise, standard normal, [2, C, H, W].
        shares: s of each mix, in [0, 1].
        t: In [0, T).

    Returns:
        x_t, [len(shares), C, H, W].
    """
    s = torch.tensor(shares, dtype=ends.dtype, device=ends.device)[:, None, None, None]
    noise = ((1 - s) * eps[:1] + s * eps[1:]) / ((1 - s).square() + s.square()).sqrt()
    images = (1 - s) * ends[:1] + s * ends[1:]
    return q_sample(schedule, images, everywhere(t, images), noise)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``range(count)``, at equal distances, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
