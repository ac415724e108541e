"""A feature network from a TorchScript file: any module that maps uint8 images to rows of numbers.

A TorchScript file holds a program. It runs in torch's interpreter, which has no files and no network, but it is to be
trusted no further than its sha256 is: callers compare that before they hand the bytes over.
"""

import io
import re
from pathlib import PurePosixPath

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

__all__ = ["PREFIX", "load", "name_of", "word_of"]

PREFIX = "module:"
"""What ``--features`` begins with for such a file."""

_PROBE = (2, 3, 32, 32)


class _Features(nn.Module):
    """The module, its output in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.module(images.contiguous())
        return features.float()


def load(data: bytes, location: str) -> tuple[nn.Module, int]:
    """The module in evaluation mode, and the length of its features.

    Args:
        data: The file's bytes, whose sha256 was compared.
        location: Where they lay, for messages.

    Raises:
        UserError: The bytes are no TorchScript, or the module does not map uint8 [B, 3, H, W] to floats [B, d].
    """
    try:
        module: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UserError(f"{location} is no TorchScript file: give one that torch.jit.save wrote") from error
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return _Features(module), _dim_of(module, location)


def _dim_of(module: nn.Module, location: str) -> int:
    wanted = "a module for features maps uint8 images [B, 3, H, W] of any size to floats [B, d]"
    try:
        with torch.no_grad():
            found = module(torch.zeros(_PROBE, dtype=torch.uint8))
    except RuntimeError as error:
        raise UserError(f"{location} fails on images of {_PROBE[-1]} pixels; {wanted}") from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != _PROBE[0] or not found.is_floating_point():
        given = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{location} gives {given} for {_PROBE[0]} images; {wanted}")
    return found.shape[1]


def name_of(features: str) -> str:
    """How a protocol calls ``module:URI``: by the file's name, wherever it lies; the sha256 stands beside it."""
    return PREFIX + PurePosixPath(features.removeprefix(PREFIX)).stem


def word_of(features: str) -> str:
    """The same as part of a metric's name, for example ``module_dinov2``."""
    return re.sub(r"[^a-z0-9]+", "_", name_of(features).lower())
