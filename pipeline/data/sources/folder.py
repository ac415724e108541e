"""``folder:PATH``: image files under a folder, local or on S3."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.data.manifest import Fit
from pipeline.data.sources.base import FittedSource, Sample
from pipeline.data.sources.names import absolute, class_names, class_of, is_image
from pipeline.data.sources.pixels import IMAGE_EXTENSIONS
from pipeline.errors import UserError, WorldError

__all__ = ["FolderSource", "open_folder"]


@dataclass(frozen=True, kw_only=True)
class FolderSource(FittedSource):
    """Images under ``root`` (absolute); the first sub-folder's name is the class."""

    root: str
    files: tuple[str, ...]
    """Relative to the root, sorted."""
    sizes: tuple[int, ...]
    """Bytes of each file."""
    etags: tuple[str, ...]
    """What S3 knows of each file's content; empty on a local disk."""
    class_names: tuple[str, ...]
    reads_in_driver: bool = False

    @property
    def name(self) -> str:
        """``folder:`` and the absolute root."""
        return f"folder:{self.root}"

    def __len__(self) -> int:
        """Number of image files."""
        return len(self.files)

    def inventory(self) -> str:
        """Names, sizes and etags of all files."""
        return json.dumps([self.files, self.sizes, self.etags])

    def read(self, start: int, stop: int) -> list[Any]:
        """The bytes of the files; WorldError if one cannot be read."""
        return [_read_file(storage.join(self.root, file)) for file in self.files[start:stop]]

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """Decodes the files; UserError if one is no image."""
        labels = {name: label for label, name in enumerate(self.class_names)}
        for index, data in enumerate(items, start):
            file = self.files[index]
            yield self.fit_file(index, data, labels.get(class_of(file)), storage.join(self.root, file))


def open_folder(path: str, *, image_size: int | None, image_channels: int | None, crop: Fit) -> FolderSource:
    """Lists a folder; RGB unless told otherwise.

    Raises:
        UserError: No such folder, no images in it, loose images beside class folders, or no ``image_size``.
    """
    if image_size is None:
        raise UserError(f"folder:{path} needs a size to resize its images to; give --image-size, for example 32")
    root = absolute(path)
    if not storage.is_remote(root) and not Path(root).is_dir():
        raise UserError(f"folder:{path}: there is no folder {root}; give an existing folder of images")
    entries = ((entry.location[len(root) + 1 :], entry) for entry in storage.list_entries(root))
    images = sorted((file, entry.num_bytes, entry.etag) for file, entry in entries if is_image(file))
    if not images:
        raise UserError(f"folder:{path}: no images under {root}; allowed are {' '.join(IMAGE_EXTENSIONS)}")
    files, sizes, etags = zip(*images, strict=True)
    return FolderSource(
        root=root,
        files=files,
        sizes=sizes,
        etags=etags,
        class_names=class_names(root, files),
        image_size=image_size,
        image_channels=image_channels or 3,
        crop=crop,
    )


def _read_file(location: str) -> bytes:
    try:
        return storage.read_bytes(location)
    except OSError as error:
        raise WorldError(f"cannot read {location}: {error}; every node must see the source folder") from error
