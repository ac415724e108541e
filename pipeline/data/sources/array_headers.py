"""What an npy file says of itself, read without reading the array."""

import io
import math
from dataclasses import dataclass
from typing import IO

import numpy as np

from pipeline.data.sources.pixels import MAX_PIXELS
from pipeline.errors import UserError

__all__ = ["ArrayHeader", "parse_npy_header", "read_npy_header"]

ALLOWED = "allowed is uint8 of shape [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W], in C order"
_MAX_HEADER_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class ArrayHeader:
    """An array of images."""

    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file to the first image."""

    def __len__(self) -> int:
        """Number of images."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape[1:])

    @property
    def channels_last(self) -> bool:
        """Whether the last dimension is the channels."""
        return len(self.shape) == 4 and self.shape[3] in (1, 3)

    @property
    def channels(self) -> int:
        """1 or 3."""
        if len(self.shape) == 3:
            return 1
        return self.shape[3] if self.channels_last else self.shape[1]

    @property
    def height_width(self) -> tuple[int, int]:
        """Of every image, in pixels."""
        return self.shape[1:3] if len(self.shape) == 3 or self.channels_last else self.shape[2:4]  # type: ignore[return-value]

    def native_size(self, location: str) -> int:
        """The side of square images; UserError for others."""
        height, width = self.height_width
        if height != width:
            raise UserError(f"{location}: images of {height}x{width} are not square; give --image-size, for example 32")
        return height

    def as_picture(self, row: np.ndarray) -> np.ndarray:
        """The numbers of one image as [H, W] or [H, W, 3]."""
        array = row.reshape(self.shape[1:])
        if len(self.shape) == 4 and not self.channels_last:
            array = array.transpose(1, 2, 0)
        return np.ascontiguousarray(array[..., 0] if self.channels == 1 and array.ndim == 3 else array)


def read_npy_header(file: IO[bytes], location: str, *, as_planes: bool = False) -> ArrayHeader:
    """The header of an npy file, which stands at its first byte and is left at its first image.

    Args:
        file: The npy file.
        location: What to call it in errors.
        as_planes: Takes [N, 3 S S] for [N, 3, S, S].

    Raises:
        UserError: No npy file, or an array that is not images.
    """
    shape, fortran_order, dtype, num_bytes = parse_npy_header(file, location)
    if as_planes and len(shape) == 2 and (side := math.isqrt(shape[1] // 3)) ** 2 * 3 == shape[1]:
        shape = (shape[0], 3, side, side)
    header = ArrayHeader(shape=shape, offset=num_bytes)
    if dtype != np.uint8 or fortran_order or len(shape) not in (3, 4) or (len(shape) == 4 and not _has_channels(shape)):
        order = " in Fortran order" if fortran_order else ""
        found = f"{dtype} of shape {list(shape)}{order}"
        raise UserError(f"{location} holds {found}; {ALLOWED}: convert it, for example x.astype('uint8')")
    if 0 in shape:
        raise UserError(f"{location} holds no images (shape {list(shape)}); give an array of at least one")
    if math.prod(header.height_width) > MAX_PIXELS:
        raise UserError(
            f"{location}: images of shape {list(shape[1:])} have more than {MAX_PIXELS} pixels; shrink them"
        )
    return header


def parse_npy_header(file: IO[bytes], location: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype and the bytes of the header itself of any npy file."""
    # NumPy would read a header of any length into memory before it refuses it.
    beginning = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(beginning)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(beginning)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(beginning)
        else:
            raise ValueError(f"version {version} is for structured arrays")
    except ValueError as error:
        raise UserError(f"{location} is no npy file that can be read ({error}); {ALLOWED}") from error
    file.seek(beginning.tell())
    return shape, fortran_order, dtype, beginning.tell()


def _has_channels(shape: tuple[int, ...]) -> bool:
    return shape[3] in (1, 3) or shape[1] in (1, 3)
