"""Images from a network and a seed: one chunk at a time, the same bytes whoever makes them.

A chunk's noise is a function of ``(sample_seed, chunk)``. The chunk is the unit, not the image, since the last bits of
a network's output depend on the batch size (and on the number of threads, which the caller fixes).
"""

import torch
from torch import Tensor, nn

from pipeline import draws
from pipeline.config import SamplingConfig
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.samplers import ancestral, ddim, sampling_timesteps
from pipeline.errors import UserError, WorldError
from pipeline.images import to_uint8

__all__ = ["check_sampling", "generate_chunk"]


def check_sampling(config: SamplingConfig, T: int) -> None:
    """Refuses more sampling steps than the schedule has.

    Raises:
        UserError: ``sampling_steps`` is above T.
    """
    if config.sampling_steps > T:
        raise UserError(f"--sampling-steps {config.sampling_steps}: the model has T={T}; give at most {T}")


@torch.inference_mode()
def generate_chunk(
    unet: nn.Module,
    schedule: NoiseSchedule,
    config: SamplingConfig,
    *,
    shape: tuple[int, int, int, int],
    chunk: int,
) -> Tensor:
    """Generates one chunk of images.

    Args:
        unet: Predicts eps from (x_t, t), in evaluation mode.
        schedule: The schedule the network was trained with, on the network's device.
        config: Sampler and seed.
        shape: [B, C, H, W] of the chunk.
        chunk: Index of the chunk, at least 0.

    Returns:
        Images, uint8 [B, C, H, W], on the CPU.

    Raises:
        WorldError: The network returned values that are not finite.
    """
    check_sampling(config, schedule.T)
    device = schedule.betas.device

    def normal(purpose: draws.Purpose, *indices: int) -> Tensor:
        noise = draws.standard_normal(shape, config.sample_seed, purpose, chunk, *indices)
        return noise.to(device).contiguous(memory_format=torch.channels_last)

    def noise_at(index: int) -> Tensor:
        return normal(draws.Purpose.SAMPLE_STEP, index)

    x_T = normal(draws.Purpose.SAMPLE)
    timesteps = sampling_timesteps(schedule.T, config.sampling_steps)
    if config.sampler == "ddpm":
        x_0 = ancestral(unet, schedule, x_T, timesteps=timesteps, noise_at=noise_at, variance=config.variance)
    else:
        x_0 = ddim(unet, schedule, x_T, timesteps=timesteps, noise_at=noise_at, eta=config.eta)
    if not bool(torch.isfinite(x_0).all()):
        raise WorldError(f"the network returned values that are not finite (chunk {chunk}); the weights are broken")
    return to_uint8(x_0).cpu()
