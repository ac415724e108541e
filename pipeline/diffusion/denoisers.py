"""From a network of any kind to what samplers know: a function of (x_t, t) that predicts eps."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import as_eps
from pipeline.diffusion.stepping import Denoiser

__all__ = ["Network", "eps_denoiser", "guided"]

Network = Callable[..., Tensor]
"""(x_t [B, C, H, W], t int64 [B], and if it knows classes labels int64 [B]) -> what it predicts [B, C, H, W]."""


def eps_denoiser(network: Network, schedule: NoiseSchedule, prediction: str) -> Denoiser:
    """Turns a network that predicts eps, v or x_0 into one that predicts eps.

    Args:
        network: Called as ``network(x_t, t)``.
        schedule: The schedule that it was trained with, on its device; not respaced, since its t counts those steps.
        prediction: What it was trained to predict, one of ``PREDICTIONS``.
    """
    if prediction == "eps":
        return network

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return as_eps(prediction, schedule, x_t, t, network(x_t, t))

    return denoise


def guided(network: Network, labels: Tensor, *, num_classes: int, guidance: float = 1.0) -> Network:
    """Tells a class-conditional network what to draw, with classifier-free guidance (2207.12598), Eq. 6.

        eps_hat = eps_uncond + guidance * (eps_cond - eps_uncond)

    where guidance is the paper's 1 + w. It is the same for predictions of v and x_0: at one x_t each is an affine
    function of the others, and the factors of eps_cond and eps_uncond add up to 1.

    Args:
        network: Called as ``network(x_t, t, labels)``, where label ``num_classes`` means "no class".
        labels: Class of each image, int64 [B], in [0, num_classes).
        num_classes: Number of classes.
        guidance: 1 takes one call of the network, other weights two halves of one batch twice as large.

    Returns:
        A network of (x_t, t).
    """
    if guidance == 1.0:
        return lambda x_t, t: network(x_t, t, labels)
    both = torch.cat([labels, torch.full_like(labels, num_classes)])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return predict
