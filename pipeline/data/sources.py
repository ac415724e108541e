"""Where images come from: ``digits`` (real, offline, small) and ``folder:PATH`` (local or ``s3://``).

A source is a list of images that can be loaded by index, on any machine, in any order.
"""

import io
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline import storage
from pipeline.errors import UserError, WorldError

__all__ = ["IMAGE_EXTENSIONS", "SOURCE_SPECS", "DigitsSource", "FolderSource", "Sample", "Source"]
__all__ += ["fit_image", "open_source", "sample_key"]

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SOURCE_SPECS = ("digits", "folder:PATH")
DIGITS_SIZE = 8


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a source.

    Attributes:
        key: Name that is unique in the data set; no dots, since WebDataset splits a member's name at the first one.
        pixels: uint8 [C, H, W], H = W = the source's ``image_size``.
        label: Index into the source's ``class_names``; None in a source without classes.
    """

    key: str
    pixels: Tensor
    label: int | None


class Source(Protocol):
    """Images by index. Picklable, so that Ray tasks can load their share."""

    @property
    def name(self) -> str:
        """What the images are, in words that ``open_source`` understands."""

    @property
    def image_size(self) -> int:
        """Height and width of every image, in pixels."""

    @property
    def image_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; empty when the images have no labels."""

    def __len__(self) -> int:
        """Number of images."""

    def load(self, index: int) -> Sample:
        """Image ``index``, in [0, len)."""

    def inventory(self) -> str:
        """Text that changes when an image is added, removed, renamed or resized on disk; no pixels are read."""


def open_source(spec: str, *, image_size: int | None = None, image_channels: int | None = None) -> Source:
    """Opens the images that a spec names.

    Args:
        spec: ``digits`` (1,797 real 8x8 grey images, 10 classes, from scikit-learn) or ``folder:PATH``. A relative
            PATH is relative to the working directory.
        image_size: Side to crop and resize to, in pixels; None keeps the native 8 of ``digits``.
        image_channels: 1 (grey) or 3 (RGB); None means 1 for ``digits`` and 3 for a folder.

    Raises:
        UserError: Unknown spec, missing or empty folder, no ``image_size`` for a folder, impossible size or channels.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: give a size of at least 1 pixel")
    if image_channels not in (None, 1, 3):
        raise UserError(f"--image-channels {image_channels}: give 1 (grey) or 3 (RGB)")
    kind, _, path = spec.partition(":")
    if spec == "digits":
        return DigitsSource(image_size=image_size or DIGITS_SIZE, image_channels=image_channels or 1)
    if kind == "folder" and path:
        return _open_folder(path, image_size, image_channels or 3)
    raise UserError(f"--source {spec!r} is not known; give one of: {', '.join(SOURCE_SPECS)}")


def sample_key(index: int) -> str:
    """The key of a source's image ``index``."""
    return f"{index:09d}"


@dataclass(frozen=True, kw_only=True)
class DigitsSource:
    """Handwritten digits of the UCI test set as scikit-learn ships them: no download, real images, labels 0-9."""

    image_size: int = DIGITS_SIZE
    image_channels: int = 1
    name: str = "digits"
    class_names: tuple[str, ...] = tuple("0123456789")

    def __len__(self) -> int:
        """1,797."""
        return len(_digits()[1])

    def load(self, index: int) -> Sample:
        """Image ``index`` with its digit as label."""
        images, labels = _digits()
        pixels = fit_image(Image.fromarray(images[index]), self.image_size, self.image_channels)
        return Sample(sample_key(index), pixels, int(labels[index]))

    def inventory(self) -> str:
        """The digits are part of scikit-learn and do not change."""
        return f"{len(self)} digits"


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Images under ``root`` (absolute); ``files`` are relative to it, sorted, and ``sizes`` are their bytes.

    The first sub-folder's name is the class. On S3 ``sizes`` is empty: a listing gives names only.
    """

    root: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    class_names: tuple[str, ...]
    image_size: int
    image_channels: int

    @property
    def name(self) -> str:
        """``folder:`` and the absolute root."""
        return f"folder:{self.root}"

    def __len__(self) -> int:
        """Number of image files."""
        return len(self.files)

    def load(self, index: int) -> Sample:
        """Reads, crops and resizes one file; UserError if it is no image, WorldError if it cannot be read."""
        file = self.files[index]
        pixels = _decode_file(storage.join(self.root, file), self.image_size, self.image_channels)
        label = self.class_names.index(_class_of(file)) if self.class_names else None
        return Sample(sample_key(index), pixels, label)

    def inventory(self) -> str:
        """Names and sizes of all files."""
        return json.dumps([self.files, self.sizes])


def fit_image(picture: Image.Image, size: int, channels: int) -> Tensor:
    """Brings any picture to uint8 [channels, size, size]: upright, on white, centre square, resized.

    Lanczos both ways: Pillow stretches the kernel by the shrinking factor, so it is antialiased (plain bilinear or
    torch's default is not), it keeps more detail than a box, and it is what the FFHQ and EDM data sets were made with.
    A picture that already has the size is not resampled.
    """
    picture = _flatten(ImageOps.exif_transpose(picture)).convert("L" if channels == 1 else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    array = np.array(picture)
    return torch.from_numpy(array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1)))


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


def _decode_file(location: str, size: int, channels: int) -> Tensor:
    try:
        data = storage.read_bytes(location)
    except OSError as error:
        raise WorldError(f"cannot read {location}: {error}; every node must see the source folder") from error
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return fit_image(picture, size, channels)
    except Exception as error:  # Pillow's plug-ins raise anything on broken files, struct.error and IndexError too
        raise UserError(f"{location} is not an image that can be read ({error}); repair or remove it") from error


def _open_folder(path: str, image_size: int | None, image_channels: int) -> FolderSource:
    if image_size is None:
        raise UserError(f"folder:{path} needs a size to resize its images to; give --image-size, for example 32")
    root = path.rstrip("/") if storage.is_remote(path) else str(Path(path).expanduser().absolute())
    if not storage.is_remote(root) and not Path(root).is_dir():
        raise UserError(f"folder:{path}: there is no folder {root}; give an existing folder of images")
    locations = [each for each in storage.list_files(root) if _is_image(each[len(root) + 1 :])]
    if not locations:
        raise UserError(f"folder:{path}: no images under {root}; allowed are {' '.join(IMAGE_EXTENSIONS)}")
    files = tuple(sorted(each[len(root) + 1 :] for each in locations))
    return FolderSource(
        root=root,
        files=files,
        sizes=() if storage.is_remote(root) else tuple(os.path.getsize(storage.join(root, file)) for file in files),
        class_names=_class_names(root, files),
        image_size=image_size,
        image_channels=image_channels,
    )


def _is_image(file: str) -> bool:
    path = PurePosixPath(file)
    # Hidden files are what desktops and notebooks leave behind (._photo.jpg, .ipynb_checkpoints/), not images.
    return path.suffix.lower() in IMAGE_EXTENSIONS and not any(part.startswith(".") for part in path.parts)


def _class_of(file: str) -> str:
    first, slash, _ = file.partition("/")
    return first if slash else ""


def _class_names(root: str, files: tuple[str, ...]) -> tuple[str, ...]:
    names = {_class_of(file) for file in files}
    if names == {""}:
        return ()
    if "" in names:
        loose = next(file for file in files if not _class_of(file))
        raise UserError(f"{root}: {loose} lies beside the class folders; move all images into class folders, or none")
    return tuple(sorted(names))


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.rint(bunch.images * 255 / 16).astype(np.uint8), bunch.target
