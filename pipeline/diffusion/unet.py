"""The paper's UNet: which noise is in this image? Layer by layer that of the DDPM code, weight-compatible with it.

A class-conditional network has one more table, of class vectors, and all other weights unchanged.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.diffusion.layers import Attention, Block, Downsample, Level, ResBlock, TimeEmbedding, Upsample, group_norm
from pipeline.errors import UserError

__all__ = ["UNet", "num_parameters"]

# The last layer of every residual branch starts near zero, so that each block starts as the identity. Not zero itself:
# the value is the paper's code's, and with 0 the layers before it would get no gradient in the first step.
NEARLY_ZERO = 1e-10


class UNet(nn.Module):
    """Predicts the noise in x_t (or v, or x_0: the training decides) from x_t, t and perhaps a class: DDPM, App. B.

    Residual blocks on ``len(channel_mult)`` resolutions, each half the one before; self-attention where
    ``attention_resolutions`` says and once in the middle; the way up sees every activation of the way down.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        num_classes: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Builds the network with freshly drawn weights; on the meta device only its shape.

        Args:
            image_size: Height and width of the images in pixels, divisible by 2 ** (levels - 1).
            in_channels: Channels of the images and of the prediction.
            base_channels: Channels of the first level, even and at least 4.
            channel_mult: Channels of each level as multiples of ``base_channels``, the finest level first.
            num_res_blocks: Residual blocks a level on the way down; one more on the way up.
            attention_resolutions: Heights in pixels of the levels with self-attention.
            dropout: Probability before the second convolution of a residual block, in [0, 1).
            num_classes: Classes that the network can be told; 0 builds the unconditional network.
            generator: CPU generator of the initial weights; None takes torch's global one.

        Raises:
            UserError: A size is not positive, the image cannot be halved often enough, or an attention resolution does
                not occur.
        """
        super().__init__()
        _check(image_size, in_channels, base_channels, channel_mult, num_res_blocks, attention_resolutions, dropout)
        device = torch.empty(0).device
        # Built as shapes only: torch's own initial weights would cost time, and draws from the global generator.
        with torch.device("meta"):
            self._build(
                resolutions=[image_size // 2**level for level in range(len(channel_mult))],
                widths=[base_channels * mult for mult in channel_mult],
                in_channels=in_channels,
                base_channels=base_channels,
                num_res_blocks=num_res_blocks,
                attention_resolutions=frozenset(attention_resolutions),
                dropout=dropout,
                num_classes=num_classes,
            )
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(generator)

    def _build(
        self,
        *,
        resolutions: list[int],
        widths: list[int],
        in_channels: int,
        base_channels: int,
        num_res_blocks: int,
        attention_resolutions: frozenset[int],
        dropout: float,
        num_classes: int,
    ) -> None:
        temb = 4 * base_channels
        self.num_classes = num_classes
        self.time_embedding = TimeEmbedding(base_channels, num_classes)
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        last = len(widths) - 1

        skips, width = [base_channels], base_channels
        self.down = nn.ModuleList()
        for level, (resolution, out) in enumerate(zip(resolutions, widths, strict=True)):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks):
                blocks.append(Block(width, out, temb, dropout, resolution in attention_resolutions))
                skips.append(width := out)
            self.down.append(Level(blocks, Downsample(out) if level < last else None))
            if level < last:
                skips.append(out)

        self.mid = nn.ModuleList([Block(width, width, temb, dropout, True), Block(width, width, temb, dropout, False)])

        self.up = nn.ModuleList()
        for level, (resolution, out) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(Block(width + skips.pop(), out, temb, dropout, resolution in attention_resolutions))
                width = out
            self.up.append(Level(blocks, Upsample(out) if level > 0 else None))

        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicts the noise, or what else the network was trained to predict.

        Args:
            x: Noisy images x_t, shape [B, C, H, W], floating point; fastest in ``torch.channels_last``.
            t: Step indices, shape [B], int64, in [0, T).
            labels: Classes, shape [B], int64, in [0, num_classes]; ``num_classes`` itself means "no class", as does
                None for the whole batch. Always None in an unconditional network.

        Returns:
            eps_hat (v_hat, x_0_hat), shape [B, C, H, W].
        """
        if self.num_classes and labels is None:
            labels = torch.full_like(t, self.num_classes)
        assert self.num_classes or labels is None, "labels for a network without classes"
        temb = self.time_embedding(t, x.dtype, labels)
        h: Tensor = self.conv_in(x)
        skips = [h]
        for level in self.down:
            assert isinstance(level, Level)
            for block in level.blocks:
                h = block(h, temb)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        for block in self.mid:
            h = block(h, temb)
        for level in self.up:
            assert isinstance(level, Level)
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
            if level.resample is not None:
                h = level.resample(h)
        prediction: Tensor = self.conv_out(functional.silu(self.norm_out(h)))
        return prediction

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew, as a function of the generator's state alone.

        variance_scaling(1, "fan_avg", "uniform"), that is uniform in +-sqrt(6 / (fan_in + fan_out)); scale 1e-10 where
        a residual branch ends. Drawn on the CPU, so the device makes no difference.

        Args:
            generator: A CPU generator; None takes torch's global one.
        """
        residual_ends: set[nn.Module] = {self.conv_out}
        fused: set[nn.Module] = set()
        for module in self.modules():
            if isinstance(module, ResBlock):
                residual_ends.add(module.conv2)
            elif isinstance(module, Attention):
                residual_ends.add(module.proj_out)
                fused.add(module.qkv)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                scale = NEARLY_ZERO if module in residual_ends else 1.0
                # q, k and v are three layers to the initialiser: their fan_out is C each, not 3 C.
                for weight in module.weight.chunk(3 if module in fused else 1):
                    _variance_scaling_(weight, scale, generator)
                assert module.bias is not None
                module.bias.zero_()
        # A table of class vectors is a dense layer over one-hot classes. Drawn last: all other weights of a seed are
        # those of the unconditional network.
        if self.time_embedding.classes is not None:
            _variance_scaling_(self.time_embedding.classes.weight, 1.0, generator)


def num_parameters(model: nn.Module) -> int:
    """Number of parameters; costs nothing for a model built on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def _variance_scaling_(weight: Tensor, scale: float, generator: torch.Generator | None) -> None:
    fan_out, fan_in = weight.shape[:2]
    fan_avg = (fan_in + fan_out) / 2 * math.prod(weight.shape[2:])
    limit = math.sqrt(3 * scale / fan_avg)
    drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu").uniform_(-limit, limit, generator=generator)
    weight.copy_(drawn)


def _check(
    image_size: int,
    in_channels: int,
    base_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    dropout: float,
) -> None:
    counts = {"image_size": image_size, "in_channels": in_channels, "num_res_blocks": num_res_blocks}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}={value}: use 1 or more")
    if base_channels < 4 or base_channels % 2:
        raise UserError(
            f"base_channels={base_channels}: use an even number from 4 on (sines and cosines of t share it)"
        )
    if not channel_mult or min(channel_mult) < 1:
        raise UserError(f"channel_mult={tuple(channel_mult)}: use one whole number >= 1 a level, e.g. (1, 2, 2, 2)")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout}: use a value in [0, 1)")

    levels = len(channel_mult)
    factor = 2 ** (levels - 1)
    if image_size % factor:
        nearest = max(factor, (image_size + factor // 2) // factor * factor)
        raise UserError(
            f"image_size={image_size} cannot be halved {levels - 1} times (channel_mult has {levels} levels): "
            f"use {nearest}, or another multiple of {factor}, or fewer levels"
        )
    resolutions = [image_size // 2**level for level in range(levels)]
    absent = sorted(set(attention_resolutions) - set(resolutions))
    if absent:
        raise UserError(
            f"attention_resolutions={tuple(attention_resolutions)}: the network never has a height of {absent}; with "
            f"image_size={image_size} and {levels} levels it has {resolutions}"
        )
