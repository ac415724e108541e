"""Images from a network and a seed: one chunk at a time, the same bytes whoever makes them.

A chunk's noise and classes are functions of ``(sample_seed, chunk)``. The chunk is the unit, not the image, since the
last bits of a network's output depend on the batch size (and on the number of threads, which the caller fixes).
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline import draws
from pipeline.config import SamplingConfig, TrainConfig
from pipeline.diffusion.denoisers import Network, eps_denoiser, guided
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.diffusion.solvers import heun_grid
from pipeline.diffusion.stepping import Denoiser, LimitX0, NoiseAt, clip, dynamic_threshold
from pipeline.diffusion.timesteps import spaced_timesteps
from pipeline.errors import UserError, WorldError
from pipeline.images import to_uint8

__all__ = ["check_sampling", "denoiser_of", "generate_chunk", "labels_of_chunk", "limit_of", "sample"]


def check_sampling(config: SamplingConfig, trained: TrainConfig) -> None:
    """Refuses to sample in a way that the network was not trained for.

    Args:
        config: How to sample.
        trained: The config of the network's training.

    Raises:
        UserError: ``sampling_steps`` is above T; ``guidance`` without classes, or without training on hidden labels.
    """
    T = trained.diffusion.T
    if config.sampling_steps > T:
        raise UserError(f"--sampling-steps {config.sampling_steps}: the model has T={T}; give at most {T}")
    if config.guidance == 1:
        return
    if trained.model.num_classes == 0:
        raise UserError(f"--guidance {config.guidance:g}: the model has no classes (--num-classes 0); give 1")
    if trained.loss.label_dropout == 0:
        raise UserError(
            f"--guidance {config.guidance:g}: the model was never trained without labels (--label-dropout 0); give 1"
        )


@torch.inference_mode()
def generate_chunk(
    unet: nn.Module,
    schedule: NoiseSchedule,
    config: SamplingConfig,
    *,
    trained: TrainConfig,
    shape: tuple[int, int, int, int],
    chunk: int,
) -> Tensor:
    """Generates one chunk of images, of a class-conditional network those of classes drawn uniformly.

    Args:
        unet: The network, in evaluation mode.
        schedule: The schedule the network was trained with, on the network's device.
        config: Sampler and seed.
        trained: The config of the network's training: what it predicts, and which classes it knows.
        shape: [B, C, H, W] of the chunk.
        chunk: Index of the chunk, at least 0.

    Returns:
        Images, uint8 [B, C, H, W], on the CPU.

    Raises:
        UserError: As ``check_sampling``.
        WorldError: The network returned values that are not finite.
    """
    check_sampling(config, trained)
    device = schedule.betas.device

    def normal(purpose: draws.Purpose, *indices: int) -> Tensor:
        noise = draws.standard_normal(shape, config.sample_seed, purpose, chunk, *indices)
        return noise.to(device).contiguous(memory_format=torch.channels_last)

    def noise_at(index: int) -> Tensor:
        return normal(draws.Purpose.SAMPLE_STEP, index)

    denoise = denoiser_of(unet, schedule, config, trained=trained, size=shape[0], chunk=chunk)
    x_0 = sample(denoise, schedule, config, normal(draws.Purpose.SAMPLE), noise_at)
    if not bool(torch.isfinite(x_0).all()):
        raise WorldError(f"the network returned values that are not finite (chunk {chunk}); the weights are broken")
    return to_uint8(x_0).cpu()


def denoiser_of(
    unet: nn.Module, schedule: NoiseSchedule, config: SamplingConfig, *, trained: TrainConfig, size: int, chunk: int
) -> Denoiser:
    """The network as samplers call it: with the classes of a chunk of ``size`` images, guidance, and eps as answer."""
    device = schedule.betas.device
    network = _told_classes(unet, config, trained.model.num_classes, size=size, chunk=chunk, device=device)
    return eps_denoiser(network, schedule, trained.model.prediction)


def sample(
    denoise: Denoiser, schedule: NoiseSchedule, config: SamplingConfig, x_T: Tensor, noise_at: NoiseAt
) -> Tensor:
    """Runs the sampler that ``config`` names, from x_T to x_0; model values [B, C, H, W], nominally in [-1, 1]."""
    num_timesteps, options = _plan(config)
    return SAMPLERS[config.sampler](
        denoise,
        schedule,
        x_T,
        timesteps=spaced_timesteps(schedule, num_timesteps, config.spacing),
        noise_at=noise_at,
        limit_x_0=limit_of(config),
        **options,
    )


def _plan(config: SamplingConfig) -> tuple[int, dict[str, Any]]:
    """How many timesteps make so many network evaluations, and the options that this sampler alone has."""
    if config.sampler == "heun":
        num_timesteps, num_corrected = heun_grid(config.sampling_steps)
        return num_timesteps, {"num_corrected": num_corrected}
    only: dict[str, dict[str, Any]] = {"ddpm": {"variance": config.variance}, "ddim": {"eta": config.eta}}
    return config.sampling_steps, only.get(config.sampler, {})


def limit_of(config: SamplingConfig) -> LimitX0 | None:
    """How ``--x0-clipping`` keeps the predicted image in range."""
    return {"none": None, "clip": clip, "dynamic": dynamic_threshold(config.x0_percentile)}[config.x0_clipping]


def labels_of_chunk(config: SamplingConfig, num_classes: int, *, size: int, chunk: int) -> Tensor:
    """The classes of a chunk's images, int64 [size], uniform in [0, num_classes); on the CPU."""
    return draws.integers(size, num_classes, config.sample_seed, draws.Purpose.SAMPLE_LABEL, chunk)


def _told_classes(
    unet: nn.Module, config: SamplingConfig, num_classes: int, *, size: int, chunk: int, device: torch.device
) -> Network:
    if num_classes == 0:
        return unet
    labels = labels_of_chunk(config, num_classes, size=size, chunk=chunk).to(device)
    return guided(unet, labels, num_classes=num_classes, guidance=config.guidance)
