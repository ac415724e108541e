"""One image file inside an archive: what a listing says of it, and what is refused."""

from typing import NamedTuple

from pipeline.data.sources.pixels import MAX_FILE_BYTES
from pipeline.errors import UserError

__all__ = ["Member", "clean_name", "refuse_large"]


class Member(NamedTuple):
    """A member of an archive; archives hold millions of them, so it is a plain tuple."""

    name: str
    """With single slashes; a label for people, never a path."""
    size: int
    """Bytes of the file."""
    offset: int
    """Where its bytes (tar) or its header (zip) begin."""
    packed: int
    """Bytes it takes in the archive."""
    method: int = 0
    """How a zip compresses it: 0 not at all, 8 deflate."""
    crc: int = 0
    """Checksum of the file, in a zip."""


def clean_name(name: str) -> str:
    """A member's name without ``./`` and doubled slashes."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def refuse_large(name: str, size: int, location: str) -> None:
    """UserError for a member that claims to be larger than any image."""
    if size > MAX_FILE_BYTES:
        allowed = f"at most {MAX_FILE_BYTES // 2**20} MiB are allowed"
        raise UserError(f"{name} in {location} has {size} bytes and {allowed}; leave it out of the archive")
