"""The networks whose training step is compared: the DDPM paper's CIFAR-10 UNet, ours and as others wrote it.

A peer is a function of the path of its clone (None where it is a package) that imports what it needs and returns the
network and how to call it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "OURS", "Network", "make_adam", "num_parameters"]

OURS = "ours"
Call = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) to the predicted noise."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One contender.

    Attributes:
        title: What the table calls it.
        build: Imports and builds it in training mode, with dropout 0.1.
        channels_last: Weights and images in that memory format.
        fused_adam: Whether its optimizer is torch's fused Adam; else torch's default.
        package: Distribution whose version belongs to the result.
    """

    title: str
    build: Callable[[Path | None], tuple[nn.Module, Call]]
    channels_last: bool = False
    fused_adam: bool = False
    package: str | None = None


def _ours(_clone: Path | None) -> tuple[nn.Module, Call]:
    from pipeline.model_folder import build_unet
    from pipeline.presets import preset

    network = build_unet(preset("cifar10").model)
    return network, network


def _diffusers(_clone: Path | None) -> tuple[nn.Module, Call]:
    from diffusers import UNet2DModel

    # google/ddpm-cifar10-32
    network: Any = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        dropout=0.1,
    )
    return network, lambda x, t: network(x, t).sample


def _improved_diffusion(clone: Path | None) -> tuple[nn.Module, Call]:
    if clone is None:
        raise ModuleNotFoundError("give --improved-diffusion the path of a clone of openai/improved-diffusion")
    # unet.py and what it imports are torch alone; the rest of the package, which needs MPI, is not imported.
    sys.path.insert(0, str(clone))
    from improved_diffusion.unet import UNetModel

    network = UNetModel(
        in_channels=3,
        model_channels=128,
        out_channels=3,
        num_res_blocks=2,
        attention_resolutions=(2,),  # where the image is halved once: at 16x16
        dropout=0.1,
        channel_mult=(1, 2, 2, 2),
        num_heads=1,
    )
    return network, network


def _lucidrains(_clone: Path | None) -> tuple[nn.Module, Call]:
    from denoising_diffusion_pytorch import Unet

    network = Unet(dim=128, dim_mults=(1, 2, 2, 2), dropout=0.1)
    return network, network


NETWORKS: dict[str, Network] = {
    OURS: Network(title="ours, `--preset cifar10`", build=_ours, channels_last=True, fused_adam=True),
    "ours-default-adam": Network(title="ours, with torch's default Adam", build=_ours, channels_last=True),
    "diffusers": Network(title="diffusers `UNet2DModel`", build=_diffusers, package="diffusers"),
    "improved-diffusion": Network(title="improved-diffusion `UNetModel`", build=_improved_diffusion),
    "lucidrains": Network(
        title="denoising-diffusion-pytorch `Unet(dim=128)`, another layout",
        build=_lucidrains,
        package="denoising-diffusion-pytorch",
    ),
}
"""By the name that ``--networks`` takes."""


def num_parameters(network: nn.Module) -> int:
    """Its size."""
    return sum(parameter.numel() for parameter in network.parameters())


def make_adam(contender: Network, network: nn.Module) -> torch.optim.Adam:
    """The paper's optimizer."""
    return torch.optim.Adam(network.parameters(), lr=2e-4, fused=contender.fused_adam or None)
