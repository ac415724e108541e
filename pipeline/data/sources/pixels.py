"""Any picture becomes a square of uint8: safely decoded, upright, on white, cropped or framed, resized."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.data.manifest import Fit
from pipeline.errors import UserError

__all__ = ["IMAGE_EXTENSIONS", "IMAGE_FORMATS", "MAX_FILE_BYTES", "MAX_PIXELS", "decode_image", "fit_image"]

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The decoders of Pillow that data can reach; its rarer ones have a history of holes."""
MAX_PIXELS = 128_000_000
"""A larger picture is refused before it is decoded: a few kilobytes of PNG can claim gigabytes of pixels."""
MAX_FILE_BYTES = 256 * 2**20
"""A larger file inside an archive is refused: no picture below ``MAX_PIXELS`` needs that much in practice."""


def fit_image(picture: Image.Image, size: int, channels: int, crop: Fit = "center") -> Tensor:
    """Brings any picture to uint8 [channels, size, size]: upright, on white, square, resized.

    Lanczos both ways: Pillow stretches the kernel by the shrinking factor, so it is antialiased (plain bilinear or
    torch's default is not), it keeps more detail than a box, and it is what the FFHQ and EDM data sets were made with.
    A picture that already has the size is not resampled.

    Args:
        picture: The picture, of any mode and shape.
        size: Height and width of the result, in pixels.
        channels: 1 (grey) or 3 (RGB).
        crop: center keeps the centre square, pad keeps all and fills up with white, stretch keeps all and distorts.
    """
    picture = _flatten(ImageOps.exif_transpose(picture)).convert("L" if channels == 1 else "RGB")
    if crop == "center":
        picture = _centre_square(picture)
    width, height = _inside(picture, size) if crop == "pad" else (size, size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if picture.size != (size, size):
        picture = _on_white(picture, size)
    array = np.array(picture)
    return torch.from_numpy(array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def decode_image(data: bytes, name: str, size: int, channels: int, crop: Fit = "center") -> Tensor:
    """Decodes an image file of one of ``IMAGE_FORMATS`` and fits it, uint8 [C, H, W].

    Args:
        data: The whole file.
        name: Where it comes from, for the error.
        size: As for ``fit_image``, and so are the others.
        channels: 1 (grey) or 3 (RGB).
        crop: center, pad or stretch.

    Raises:
        UserError: Not such an image, damaged, or of more than ``MAX_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            # Ours is the stricter rule: Pillow warns of its own limit, and again when such a picture is cropped.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
                _refuse_huge(picture, name)
                return fit_image(picture, size, channels, crop)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(_too_large(name)) from error
    except Exception as error:  # Pillow's plug-ins raise anything on broken files, struct.error and IndexError too
        # Pillow names the buffer in memory, at an address that says nothing.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        message = f"{name} is not an image that can be read ({reason}); repair or remove it"
        raise UserError(f"{message}; allowed are {', '.join(IMAGE_FORMATS)}") from error


def _refuse_huge(picture: Image.Image, name: str) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise UserError(f"{_too_large(name)} (it has {picture.width}x{picture.height})")


def _too_large(name: str) -> str:
    return f"{name} has more than the {MAX_PIXELS // 1_000_000} megapixels that are allowed; shrink or remove it"


def _flatten(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        scaled = np.rint(np.asarray(picture).astype(np.float64) / 257).clip(0, 255)
        return Image.fromarray(scaled.astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    # Before resizing: else the hidden colour of transparent pixels bleeds into their visible neighbours.
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def _centre_square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _inside(picture: Image.Image, size: int) -> tuple[int, int]:
    """Width and height of the picture when its longer side is ``size``."""
    longest = max(picture.size)
    return max(1, round(picture.width * size / longest)), max(1, round(picture.height * size / longest))


def _on_white(picture: Image.Image, size: int) -> Image.Image:
    frame = Image.new(picture.mode, (size, size), "white")
    frame.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return frame
