"""npz files: a zip of npy files."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.sources.array_headers import ArrayHeader, parse_npy_header, read_npy_header
from pipeline.data.sources.files import open_container
from pipeline.data.sources.labels import checked_labels
from pipeline.data.sources.zips import content_offset
from pipeline.errors import UserError

__all__ = ["NpzImages", "open_npz", "stream_rows"]

_IMAGES = ("images", "x", "x_train", "arr_0")
_LABELS = ("labels", "y", "y_train", "arr_1")
_SUPPORTED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True, kw_only=True)
class NpzImages:
    """The images of an npz file."""

    member: str
    """Their npy file inside the zip."""
    header: ArrayHeader
    """With the offset in the npz file if they are not compressed."""
    is_compressed: bool
    labels: tuple[int, ...]


def open_npz(location: str, *, names: tuple[str, ...] = _IMAGES, as_planes: bool = False) -> NpzImages:
    """Finds the images and the labels and reads the labels.

    Args:
        location: The file.
        names: What the array of images may be called.
        as_planes: Rows of planes are images, too: see ``read_npy_header``.

    Raises:
        UserError: No such file, no npz, no array of a known name, or arrays that do not fit.
    """
    with open_container(location) as file:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            images = _choose(members, names)
            if images is None:
                found = ", ".join(sorted(members)) or "nothing"
                raise UserError(f"{location} holds {found}; images must be in one of: {', '.join(names)}")
            header = _image_header(archive, members[images], location, as_planes)
            labels_member = _choose(members, _LABELS)
            labels = () if labels_member is None else _labels(archive, labels_member, location, len(header))
        is_compressed = members[images].compress_type != zipfile.ZIP_STORED
        if not is_compressed:
            begin = content_offset(file, members[images].header_offset, images, location)
            header = replace(header, offset=begin + header.offset)
    return NpzImages(member=images, header=header, is_compressed=is_compressed, labels=labels)


def stream_rows(location: str, member: str, *, as_planes: bool = False) -> Iterator[bytes]:
    """The bytes of all images, one after the other."""
    with open_container(location) as file, zipfile.ZipFile(file) as archive, archive.open(member) as array:
        header = read_npy_header(array, location, as_planes=as_planes)
        for _ in range(len(header)):
            yield array.read(header.row_bytes)


def _choose(members: dict[str, zipfile.ZipInfo], names: tuple[str, ...]) -> str | None:
    return next((f"{name}.npy" for name in names if f"{name}.npy" in members), None)


def _image_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, location: str, as_planes: bool) -> ArrayHeader:
    _refuse_rare(info, location)
    with archive.open(info) as array:
        header = read_npy_header(array, f"{info.filename} in {location}", as_planes=as_planes)
    if header.offset + len(header) * header.row_bytes != info.file_size:
        raise UserError(f"{info.filename} in {location} is damaged (it is not as long as it says); save it again")
    return header


def _labels(archive: zipfile.ZipFile, member: str, location: str, num_images: int) -> tuple[int, ...]:
    name = f"{member} in {location}"
    _refuse_rare(archive.getinfo(member), location)
    with archive.open(member) as array:
        shape, _, dtype, _ = parse_npy_header(array, name)
        # Before anything is read: the shape says how much memory that takes.
        if dtype.kind not in "iu" or shape not in ((num_images,), (num_images, 1)):
            needed = f"labels must be integers of shape [{num_images}], one for each image"
            raise UserError(f"{name} holds {dtype} of shape {list(shape)}; {needed}")
        data = array.read(num_images * dtype.itemsize)
    if len(data) != num_images * dtype.itemsize:
        raise UserError(f"{name} is cut off; save it again")
    return checked_labels(np.frombuffer(data, dtype).tolist(), name)


def _refuse_rare(info: zipfile.ZipInfo, location: str) -> None:
    if info.flag_bits & 0x1 or info.compress_type not in _SUPPORTED:
        raise UserError(f"{info.filename} in {location} is packed in a rare way; save it with numpy.savez")
