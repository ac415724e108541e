"""Pixels: the one place that says how numbers become bytes and back. Knows nobody.

Peers differ here, and FID differs with them (truncation, rounding, unclamped floats). Ours: a model value in [-1, 1]
becomes ``round((x + 1) * 127.5)`` after clamping, a byte becomes ``x / 127.5 - 1`` (as in the DDPM code).
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["ROUNDING", "decode_image", "encode_png", "image_grid", "to_model_range", "to_uint8"]

ROUNDING = "clamp to [-1, 1], round((x + 1) * 127.5)"
"""How generated images become bytes, in the words that an evaluation protocol records."""


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 [..., C, H, W] in [0, 255] to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(x: Tensor) -> Tensor:
    """Model values [..., C, H, W], nominally in [-1, 1], to uint8 pixels; see ``ROUNDING``."""
    return x.float().clamp(-1, 1).add(1).mul_(127.5).round_().to(torch.uint8)


def encode_png(pixels: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as PNG bytes, the same bytes for the same pixels and Pillow version."""
    array = pixels.cpu().numpy()
    picture = Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode_image(data: bytes, channels: int) -> np.ndarray:
    """Image bytes (PNG, JPEG, WebP) as uint8 [channels, H, W] with 1 (grey) or 3 (RGB) channels.

    Raises:
        ValueError: The bytes are no image that Pillow can read, or one that is absurdly large.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            array = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image: {error}") from error
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def image_grid(pixels: Tensor, *, min_side: int = 512, gap: int = 1) -> Tensor:
    """Lays images out as a near-square contact sheet, enlarged without smoothing so that small images can be judged.

    Args:
        pixels: Images, uint8 [B, C, H, W].
        min_side: The sheet is enlarged by the smallest whole factor that makes it at least this wide, in pixels.
        gap: White pixels between the images, before enlarging.

    Returns:
        The sheet, uint8 [C, H', W'].
    """
    batch, channels, height, width = pixels.shape
    columns = math.ceil(math.sqrt(batch))
    rows = math.ceil(batch / columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    factor = max(1, math.ceil(min_side / sheet.shape[2]))
    return sheet.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
