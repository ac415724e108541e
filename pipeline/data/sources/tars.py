"""Image files inside tar files, compressed or not."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self

from pipeline.data.sources.files import open_container
from pipeline.data.sources.members import Member, clean_name, refuse_large
from pipeline.data.sources.names import is_image
from pipeline.errors import UserError

__all__ = ["list_tar", "read_tar_member", "stream_members", "stream_tar"]

_MAX_HEADER_BYTES = 2**20
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def list_tar(file: BinaryIO, location: str) -> list[Member]:
    """The images of a tar in their order.

    Raises:
        UserError: No tar, a link in place of an image, or a member that is too large.
    """
    members = []
    try:
        for info, _ in stream_members(file):
            name = clean_name(info.name)
            if not is_image(name) or info.isdir():
                continue
            _refuse_odd(info, name, location)
            members.append(Member(name, info.size, info.offset_data, info.size))
    except tarfile.ReadError as error:
        raise UserError(f"{location} is no archive that can be read ({error}); give a tar or zip file") from error
    return members


def read_tar_member(file: BinaryIO, member: Member, location: str) -> bytes:
    """The bytes of an image in an uncompressed tar."""
    file.seek(member.offset)
    return _whole(file.read(member.size), member.size, member.name, location)


def stream_tar(location: str) -> Iterator[bytes]:
    """The bytes of all images that ``list_tar`` lists, one after the other."""
    with open_container(location) as file:
        for info, tar in stream_members(file):
            name = clean_name(info.name)
            if is_image(name) and not info.isdir():
                # Once more: the file may have been replaced since it was listed.
                _refuse_odd(info, name, location)
                content = tar.extractfile(info)
                assert content is not None, "a regular member has content"
                yield _whole(content.read(info.size), info.size, name, location)


def stream_members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members of a tar, each with the tar to extract it from before the next one is asked for."""
    with tarfile.open(fileobj=file, mode="r:*", tarinfo=_StrictInfo) as tar:
        for info in tar:
            yield info, tar
            # tarfile keeps all it has seen, for a look-up by name that nobody needs here.
            tar.members.clear()  # type: ignore[attr-defined]


class _StrictInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, and reads a long name of any length into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parses a header; ReadError if it is damaged, and if it is only there to announce an absurd name."""
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            # Zeros, or nothing at all, are the end of the archive.
            if any(buf):
                raise tarfile.ReadError(f"bad header: {error}") from error
            raise
        if info.type in _HEADER_TYPES and info.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        return info


def _refuse_odd(info: tarfile.TarInfo, name: str, location: str) -> None:
    if not info.isreg() or info.issparse():
        what = "is a link or a special file, not an image file"
        raise UserError(f"{name} in {location} {what}; pack it with tar --dereference --hard-dereference")
    refuse_large(name, info.size, location)


def _whole(data: bytes, size: int, name: str, location: str) -> bytes:
    if len(data) != size:
        raise UserError(f"{location} is cut off in {name}; download or pack it again")
    return data
