"""Images in rows and columns with words beside them, enlarged without smoothing."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["Row", "draw_sheet"]

_TILE = 64  # images are enlarged by a whole factor to about this width, pixels
_GAP, _MARGIN, _GROUP_GAP = 4, 14, 14
_INK, _SOFT, _PAPER = (31, 36, 48), (102, 112, 133), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a sheet."""

    images: Sequence[Tensor | None]
    """uint8 [1 or 3, H, W] each, all of one shape; None leaves a place empty."""
    label: str = ""
    """Words on its left."""
    is_apart: bool = False
    """Whether there is more room above it."""


def draw_sheet(title: str, columns: Sequence[str], rows: Sequence[Row], *, set_apart: Sequence[int] = ()) -> bytes:
    """Draws a sheet.

    Args:
        title: A line above it.
        columns: Words above each column.
        rows: As many images each as there are columns.
        set_apart: Columns with more room on their left.

    Returns:
        A PNG file, the same for the same images and Pillow version.
    """
    size = next(image for row in rows for image in row.images if image is not None).shape[-1]
    factor = max(1, round(_TILE / size))
    tile = size * factor
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    label_width = max((int(small.getlength(row.label)) for row in rows), default=0)
    room = max((int(small.getlength(words)) for words in columns), default=0)
    pitch = max(tile, room + 4) + _GAP
    lefts, x = [], _MARGIN + (label_width + 12 if label_width else 0)
    for number in range(len(columns)):
        x += _GROUP_GAP if number in set_apart else 0
        lefts.append(x + (pitch - _GAP - tile) // 2)
        x += pitch
    width = max(x - _GAP, int(font.getlength(title)) + _MARGIN) + _MARGIN
    top = _MARGIN + 32 + (22 if any(columns) else 0)
    height = top + sum(tile + _GAP + (_GROUP_GAP if row.is_apart else 0) for row in rows) - _GAP + _MARGIN
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), title, font=font, fill=_INK)
    for left, words in zip(lefts, columns, strict=True):
        draw.text((left + tile / 2, top - 7), words, font=small, fill=_SOFT, anchor="ms")
    y = top
    for row in rows:
        y += _GROUP_GAP if row.is_apart else 0
        draw.text((_MARGIN + label_width, y + tile / 2), row.label, font=small, fill=_INK, anchor="rm")
        for left, image in zip(lefts, row.images, strict=True):
            if image is not None:
                canvas.paste(_picture(image, tile), (left, y))
        y += tile + _GAP
    return _encoded(canvas)


def _picture(image: Tensor, tile: int) -> Image.Image:
    array = image.cpu().numpy()
    picture = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    return picture.convert("RGB").resize((tile, tile), Image.Resampling.NEAREST)


def _encoded(canvas: Image.Image) -> bytes:
    colours = canvas.getcolors(maxcolors=256)
    if colours is not None:  # grey images: a third of the bytes, the same pixels
        canvas = canvas.quantize(colors=len(colours), dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
