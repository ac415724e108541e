"""Image files inside zip files, read by offset: the list of members is parsed once, not by every reader."""

import struct
import zipfile
import zlib
from typing import BinaryIO

from pipeline.data.sources.members import Member, clean_name, refuse_large
from pipeline.data.sources.names import is_image
from pipeline.errors import UserError

__all__ = ["content_offset", "list_zip", "read_zip_member"]

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1


def list_zip(file: BinaryIO, location: str) -> list[Member]:
    """The images of a zip in its order.

    Raises:
        UserError: An image that is encrypted, packed in a rare way, or too large.
    """
    members = []
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = clean_name(info.filename)
            if info.is_dir() or not is_image(name):
                continue
            if info.flag_bits & _ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                how = "encrypted or compressed in a way that is not supported"
                raise UserError(f"{name} in {location} is {how}; pack it again with plain zip")
            refuse_large(name, max(info.file_size, info.compress_size), location)
            members.append(
                Member(name, info.file_size, info.header_offset, info.compress_size, info.compress_type, info.CRC)
            )
    return members


def read_zip_member(file: BinaryIO, member: Member, location: str) -> bytes:
    """The bytes of an image; never more than its listed size is unpacked."""
    file.seek(content_offset(file, member.offset, member.name, location))
    data = file.read(member.packed)
    if member.method == zipfile.ZIP_DEFLATED:
        # One byte more than listed is enough to see that the list lies.
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise UserError(f"{member.name} in {location} does not match its checksum; download or pack the zip again")
    return data


def content_offset(file: BinaryIO, header_offset: int, name: str, location: str) -> int:
    """Where the content of a member begins: behind its local header, whose length only that header knows."""
    file.seek(header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise UserError(f"{location} is damaged at {name}; download or pack the zip again")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    return header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
