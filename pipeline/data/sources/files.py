"""Single files that hold many images: opened and identified, with errors that name them."""

import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pipeline import storage
from pipeline.errors import UserError, WorldError

__all__ = ["identity", "open_container", "reading"]

_SAMPLED_BYTES = 64 * 1024
_DAMAGED: tuple[type[Exception], ...] = (EOFError, OverflowError, UnicodeDecodeError, struct.error)
_DAMAGED += (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, zlib.error, lzma.LZMAError)


def identity(location: str) -> str:
    """Size and checksum of the two ends of a file: cheap for any size.

    The end of a zip, npz or Parquet file is its index, with a checksum or statistics of all the rest. A date would not
    do: a copy of the same file is the same content.
    """
    size = storage.num_bytes(location)
    head = storage.read_range(location, 0, _SAMPLED_BYTES)
    tail = storage.read_range(location, max(0, size - _SAMPLED_BYTES), _SAMPLED_BYTES) if size else b""
    return f"{size} bytes, ends {storage.sha256_hex(head + tail)}"


@contextmanager
def open_container(location: str) -> Iterator[BinaryIO]:
    """A file that holds images, to read from anywhere; errors as ``reading``."""
    with reading(location), storage.open_binary(location) as file:
        yield file


@contextmanager
def reading(location: str) -> Iterator[None]:
    """Turns what goes wrong with a file into one line that names it.

    Raises:
        UserError: There is no such file, or it is damaged.
        WorldError: It cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no file {location}; give one that exists and that every node sees") from error
    except IsADirectoryError as error:
        raise UserError(f"{location} is a folder; give a file") from error
    except _DAMAGED as error:
        raise UserError(f"{location} is damaged ({error}); download or pack it again") from error
    except OSError as error:
        # Broken gzip and bzip2 streams are bare OSErrors without a number, those of the system have one.
        if error.errno is None:
            raise UserError(f"{location} is damaged ({error}); download or pack it again") from error
        raise WorldError(f"cannot read {location}: {error}; every node must see it") from error
