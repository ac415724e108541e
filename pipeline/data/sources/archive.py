"""``archive:PATH``: image files inside a tar or zip file. Nothing is extracted to disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Literal

from pipeline.data.manifest import Fit
from pipeline.data.sources.base import FittedSource, Sample
from pipeline.data.sources.files import identity, open_container
from pipeline.data.sources.forward import Forward
from pipeline.data.sources.members import Member
from pipeline.data.sources.names import absolute, class_names, class_of
from pipeline.data.sources.pixels import IMAGE_EXTENSIONS
from pipeline.data.sources.tars import list_tar, read_tar_member, stream_tar
from pipeline.data.sources.zips import list_zip, read_zip_member
from pipeline.errors import UserError

__all__ = ["ArchiveSource", "open_archive"]

Packing = Literal["zip", "tar", "compressed tar"]
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh")


@dataclass(frozen=True, kw_only=True)
class ArchiveSource(FittedSource):
    """Images of a tar or zip file, in its order. The first folder below the common one is the class."""

    location: str
    packing: Packing
    members: tuple[Member, ...]
    labels: tuple[int, ...]
    """One for each member; empty when the images have no classes."""
    class_names: tuple[str, ...]
    identity: str
    stream: Forward = field(compare=False, repr=False)
    """Of a compressed tar, which has no index and is read from its beginning."""

    @property
    def name(self) -> str:
        """``archive:`` and the absolute path."""
        return f"archive:{self.location}"

    @property
    def reads_in_driver(self) -> bool:
        """True for compressed tars."""
        return self.packing == "compressed tar"

    def __len__(self) -> int:
        """Number of image files."""
        return len(self.members)

    def inventory(self) -> str:
        """Size and ends of the archive, names and sizes of its images."""
        return json.dumps([self.identity, [[member.name, member.size] for member in self.members]])

    def read(self, start: int, stop: int) -> list[Any]:
        """The bytes of the image files; UserError if the archive is damaged."""
        if self.packing == "compressed tar":
            return self.stream.take(start, stop)
        read_member = read_zip_member if self.packing == "zip" else read_tar_member
        with open_container(self.location) as file:
            return [read_member(file, member, self.location) for member in self.members[start:stop]]

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """Decodes the files; UserError if one is no image."""
        for index, data in enumerate(items, start):
            label = self.labels[index] if self.labels else None
            yield self.fit_file(index, data, label, f"{self.members[index].name} in {self.location}")


def open_archive(path: str, *, image_size: int | None, image_channels: int | None, crop: Fit) -> ArchiveSource:
    """Lists an archive; RGB unless told otherwise. What it is follows from its bytes, not from its name.

    Raises:
        UserError: No such file, no archive, no images in it, a member that is refused, or no ``image_size``.
    """
    if image_size is None:
        raise UserError(f"archive:{path} needs a size to resize its images to; give --image-size, for example 32")
    location = absolute(path)
    with open_container(location) as file:
        packing = _packing(file)
        found = list_zip(file, location) if packing == "zip" else list_tar(file, location)
    if not found:
        raise UserError(f"archive:{path}: no images in it; allowed are {' '.join(IMAGE_EXTENSIONS)}")
    files = _below_common_folder([member.name for member in found])
    classes = class_names(location, files)
    labels = {name: label for label, name in enumerate(classes)}
    return ArchiveSource(
        location=location,
        packing=packing,
        members=tuple(found),
        labels=tuple(labels[class_of(file)] for file in files) if classes else (),
        class_names=classes,
        identity=identity(location),
        stream=Forward(partial(stream_tar, location)),
        image_size=image_size,
        image_channels=image_channels or 3,
        crop=crop,
    )


def _packing(file: BinaryIO) -> Packing:
    head = file.read(8)
    file.seek(0)
    if head.startswith(b"PK"):
        return "zip"
    return "compressed tar" if head.startswith(_COMPRESSED) else "tar"


def _below_common_folder(files: list[str]) -> list[str]:
    # Folders around everything (photos/train/) are how archives are packed, not a class.
    while files and len(tops := {class_of(file) for file in files}) == 1 and tops != {""}:
        files = [file.partition("/")[2] for file in files]
    return files
