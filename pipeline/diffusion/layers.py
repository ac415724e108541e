"""The layers of the paper's UNet, with the paper's code's choices where papers and libraries differ."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Attention",
    "Block",
    "Downsample",
    "Dropout",
    "Level",
    "ResBlock",
    "TimeEmbedding",
    "Upsample",
    "group_norm",
]


class Level(nn.Module):
    """The blocks of one resolution and the way to the next; ``UNet.forward`` calls them, for the sake of the skips."""

    def __init__(self, blocks: nn.ModuleList, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.resample = resample


class TimeEmbedding(nn.Module):
    """Sinusoids of t and a two-layer MLP, plus a learned vector of the class: int64 [B] -> [B, 4 * base]."""

    def __init__(self, base: int, num_classes: int = 0) -> None:
        """Of ``num_classes`` + 1 class vectors the last means "no class"; with 0 classes there are none at all."""
        super().__init__()
        self.frequencies = base // 2
        self.dense1 = nn.Linear(base, 4 * base)
        self.dense2 = nn.Linear(4 * base, 4 * base)
        self.classes = nn.Embedding(num_classes + 1, 4 * base) if num_classes else None

    def forward(self, t: Tensor, dtype: torch.dtype, labels: Tensor | None = None) -> Tensor:
        # freq_i = exp(-ln 10000 * i / (half - 1)), sines first: later codes divide by half and put cosines first.
        i = torch.arange(self.frequencies, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(i * (-math.log(10000) / (self.frequencies - 1)))
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
        embedding: Tensor = self.dense2(functional.silu(self.dense1(sinusoids)))
        if self.classes is not None:
            embedding = embedding + self.classes(labels).to(embedding.dtype)
        # Blocks see the embedding only through a swish: taken here, once.
        return functional.silu(embedding)


class Block(nn.Module):
    """A residual block, then self-attention if asked for."""

    def __init__(self, channels: int, out_channels: int, temb: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.res = ResBlock(channels, out_channels, temb, dropout)
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h: Tensor = self.attention(self.res(x, temb))
        return h


class ResBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv; + the input: [B, C, H, W] -> [B, C_out, H, W]."""

    def __init__(self, channels: int, out_channels: int, temb: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(temb, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x))) + self.time_proj(temb)[:, :, None, None]
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        y: Tensor = self.shortcut(x) + h
        return y


class Dropout(nn.Module):
    """Zeroes elements with probability p and scales the others by 1 / (1 - p), as torch's, with a cheaper mask on CPUs.

    torch draws 32 bits and a float for each element there, in one thread, which costs more than the rest of the layer.
    16 bits decide here, four elements from one draw, so that p is a multiple of 2^-16.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return functional.dropout(x, self.p, self.training)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = draws[: x.numel()] >= dropped - 2**15
        mask = torch.empty_like(x)
        # In the order of the memory, whatever the memory format: no element is moved.
        torch.as_strided(mask, keep.shape, (1,)).copy_(keep)
        return x * mask.mul_(2**16 / (2**16 - dropped))


class Attention(nn.Module):
    """Self-attention over the pixels, one head of all channels, logits times C^-0.5: [B, C, H, W] -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # [B, 3C, H, W] -> q, k, v as [B, 1, H * W, C]: views in either memory format, with unit stride along C (what
        # the fused kernels want) in channels_last.
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        h = functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))
        return y


class Downsample(nn.Module):
    """Halves the resolution: convolution of stride 2, padded at the right and bottom only (TensorFlow's "SAME")."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in the paper; narrow layers (a small model's) take fewer, of at least two channels each.

    A group of one channel would subtract every channel's mean and with it whatever the bias before it does: that bias
    then has a gradient of pure rounding noise, which Adam turns into steps of full size.
    """
    groups = max(n for n in range(1, min(32, max(1, channels // 2)) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)
