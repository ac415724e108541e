"""Pixels: the one place that says how numbers become bytes and back. Knows nobody.

Peers differ here, and FID differs with them (truncation, rounding, unclamped floats). Ours: a model value in [-1, 1]
becomes ``round((x + 1) * 127.5)`` after clamping, a byte becomes ``x / 127.5 - 1`` (as in the DDPM code).
"""

import io
import math
from typing import Any

import imagecodecs
import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["ROUNDING", "decode_into", "encode_image", "encode_png", "image_grid", "shrink_png", "to_model_range"]
__all__ += ["to_uint8"]

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
    return encode_image(pixels, "png")


def encode_image(pixels: Tensor, image_format: str, quality: int = 95) -> bytes:
    """uint8 [1 or 3, H, W] as the bytes of an image file, the same for the same pixels and Pillow version.

    Args:
        pixels: The image.
        image_format: png (lossless), jpeg or webp.
        quality: 1..100 for jpeg and webp; 100 makes webp lossless.
    """
    array = pixels.cpu().numpy()
    picture = Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    options: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 6},
        # No chroma subsampling: the default halves the resolution of colour, which a generative model learns.
        "jpeg": {"quality": quality, "subsampling": 0},
        "webp": {"quality": quality, "lossless": quality == 100},
    }
    buffer = io.BytesIO()
    picture.save(buffer, format=image_format.upper(), **options[image_format])
    return buffer.getvalue()


def decode_into(data: bytes, out: np.ndarray) -> None:
    """Decodes a PNG, JPEG or WebP file into ``out``, uint8 [H, W, 1 or 3].

    Nothing is converted (palettes and single bits are written out): an image of another size, depth or number of
    channels is an error. The size is compared with
    ``out`` before memory is allocated, so a file that claims to be huge is refused at once.

    Raises:
        ValueError: Not such an image, damaged, or of another shape than ``out``.
    """
    decode = _DECODERS.get(data[:3])
    if decode is None:
        raise ValueError("not a PNG, JPEG or WebP image")
    if data[:3] == _JPEG and data.find(_END_OF_JPEG, _start_of_scan(data)) < 0:
        # The decoder would fill what is missing with grey.
        raise ValueError("not a readable image: the JPEG file is cut off")
    # Grey images are decoded as [H, W]; a view of the one channel is the same memory.
    target = out[..., 0] if out.shape[2] == 1 else out
    try:
        decoded = decode(data, out=target)
    except (RuntimeError, ValueError) as error:
        raise ValueError(_other_shape(data, out.shape) or f"not a readable image: {error}") from error
    if decoded is not target:
        target[...] = decoded


def _other_shape(data: bytes, expected: tuple[int, ...]) -> str:
    """Why an image does not fit, if that is the reason; reads its header only."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            found = (picture.height, picture.width, len(picture.getbands()))
            mode = picture.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    if found == expected and mode in ("L", "RGB"):
        return ""
    return (
        f"expected {'x'.join(map(str, expected))} (height, width, channels), found {'x'.join(map(str, found))} {mode}"
    )


def _start_of_scan(data: bytes) -> int:
    """Where the coded image of a JPEG begins: after the segments, one of which may hold a thumbnail, another JPEG."""
    offset = 2
    while data[offset : offset + 1] == b"\xff" and data[offset + 1 : offset + 2] not in (b"", b"\xda"):
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return offset


_JPEG = b"\xff\xd8\xff"
_END_OF_JPEG = b"\xff\xd9"  # within the coded image 0xff is followed by 0x00
# By the first bytes of a file. All of them release Python's lock and decode straight into a given array.
_DECODERS = {
    b"\x89PN": imagecodecs.png_decode,
    _JPEG: imagecodecs.jpeg8_decode,
    b"RIF": imagecodecs.webp_decode,
}


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


def shrink_png(data: bytes, most: int) -> bytes | None:
    """A PNG file whose picture is at most ``most`` pixels wide, as it came if it is; None if it is no PNG file."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.width <= most:
                picture.verify()
                return data
            height = max(1, round(picture.height * most / picture.width))
            smaller = picture.convert("RGB").resize((most, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    buffer = io.BytesIO()
    smaller.save(buffer, format="PNG")
    return buffer.getvalue()
