"""From a spec, as users write it, to a source."""

from collections.abc import Callable
from functools import partial
from typing import get_args

from pipeline.data.manifest import Fit
from pipeline.data.sources.archive import open_archive
from pipeline.data.sources.arrays import open_npy, open_npz_source
from pipeline.data.sources.base import Source
from pipeline.data.sources.cifar10 import open_cifar10
from pipeline.data.sources.digits import DigitsSource
from pipeline.data.sources.folder import open_folder
from pipeline.data.sources.imagenet import open_imagenet
from pipeline.errors import UserError

__all__ = ["SOURCE_SPECS", "open_source"]

SOURCE_SPECS = (
    "digits",
    "folder:PATH",
    "archive:PATH",
    "cifar10:PATH",
    "cifar10-test:PATH",
    "parquet:PATTERN",
    "npy:PATH",
    "npz:PATH",
    "imagenet:PATTERN",
    "webdataset:PATTERN",
)


def open_source(
    spec: str, *, image_size: int | None = None, image_channels: int | None = None, crop: Fit = "center"
) -> Source:
    """Opens the images that a spec names.

    A relative PATH is relative to the working directory; a PATH may be an ``s3://`` URI.

    Args:
        spec: One of ``SOURCE_SPECS``, except for ``webdataset:``, whose shards are indexed where they are.
        image_size: Side to bring the images to, in pixels; None keeps the native size of a source that has one.
        image_channels: 1 (grey) or 3 (RGB); None means the native number, and 3 for image files.
        crop: How a picture that is not square becomes one: center, pad or stretch.

    Raises:
        UserError: Unknown spec, nothing there, no ``image_size`` where it is needed, impossible size or channels.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: give a size of at least 1 pixel")
    if image_channels not in (None, 1, 3):
        raise UserError(f"--image-channels {image_channels}: give 1 (grey) or 3 (RGB)")
    if crop not in get_args(Fit):
        raise UserError(f"crop {crop!r} is not known; give one of: {', '.join(get_args(Fit))}")
    if spec == "digits":
        return DigitsSource(image_size=image_size or 8, image_channels=image_channels or 1, crop=crop)
    kind, _, path = spec.partition(":")
    if kind in _OPENERS and path:
        return _OPENERS[kind](path, image_size=image_size, image_channels=image_channels, crop=crop)
    raise UserError(f"--source {spec!r} is not known; give one of: {', '.join(SOURCE_SPECS)}")


def _open_parquet(path: str, *, image_size: int | None, image_channels: int | None, crop: Fit) -> Source:
    # Arrow is slow to load and no other source needs it.
    from pipeline.data.sources.parquet import open_parquet

    return open_parquet(path, image_size=image_size, image_channels=image_channels, crop=crop)


_OPENERS: dict[str, Callable[..., Source]] = {
    "folder": open_folder,
    "archive": open_archive,
    "cifar10": open_cifar10,
    "cifar10-test": partial(open_cifar10, test=True),
    "parquet": _open_parquet,
    "npy": open_npy,
    "npz": open_npz_source,
    "imagenet": open_imagenet,
}
