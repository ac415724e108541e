"""Writing files whole or not at all."""

import hashlib
import os
import tempfile
from pathlib import Path

from pipeline.errors import WorldError
from pipeline.storage.locations import PARTIAL, is_remote, split
from pipeline.storage.patience import patiently
from pipeline.storage.s3_client import s3, s3_errors

__all__ = ["remove", "sha256_hex", "write_bytes"]


def write_bytes(location: str, data: bytes, *, patience_seconds: float = 0) -> None:
    """Writes a file whole or not at all: a reader sees the old bytes or the new ones, never a part.

    Args:
        location: The file.
        data: Its content.
        patience_seconds: How long to try again while S3 is unreachable.

    Raises:
        UnreachableError: S3 did not answer.
        WorldError: The disk is full, the folder is not writable, or S3 refused.
    """
    if is_remote(location):
        patiently(location, patience_seconds, lambda: _put(location, data))
        return
    path = Path(location)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=PARTIAL, delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise WorldError(f"cannot write {location}: {error.strerror or error}") from error


def remove(location: str) -> None:
    """Removes a file; nothing happens if there is none.

    Raises:
        UnreachableError: S3 did not answer.
        WorldError: The folder is not writable, or S3 refused.
    """
    if is_remote(location):
        bucket, key = split(location)
        with s3_errors(location):
            s3().delete_object(Bucket=bucket, Key=key)
        return
    try:
        Path(location).unlink(missing_ok=True)
    except OSError as error:
        raise WorldError(f"cannot remove {location}: {error.strerror or error}") from error


def _put(location: str, data: bytes) -> None:
    bucket, key = split(location)
    with s3_errors(location):
        s3().put_object(Bucket=bucket, Key=key, Body=data)


def sha256_hex(data: bytes) -> str:
    """The sha256 of some bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _umask() -> int:
    # There is no call that reads the mask without setting it; the two calls restore it at once.
    mask = os.umask(0)
    os.umask(mask)
    return mask
