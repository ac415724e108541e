"""Reading files: whole, by range, in pieces or as a file object."""

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import WorldError
from pipeline.storage.locations import is_remote, split
from pipeline.storage.patience import patiently
from pipeline.storage.s3_client import s3, s3_errors

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

__all__ = ["exists", "num_bytes", "open_binary", "read_bytes", "read_chunks", "read_range"]

_BUFFER_BYTES = 2**20


def exists(location: str) -> bool:
    """Whether a file (not a folder) is there.

    Raises:
        UnreachableError: Storage did not answer.
        WorldError: Storage refused.
    """
    if not is_remote(location):
        return Path(location).is_file()
    try:
        _head(location)
    except FileNotFoundError:
        return False
    return True


def num_bytes(location: str) -> int:
    """The size of a file. Raises as ``read_bytes``."""
    if not is_remote(location):
        path = Path(location)
        if path.is_dir():
            raise FileNotFoundError(location)
        return path.stat().st_size
    return _version(location)[0]


def read_bytes(location: str, *, patience_seconds: float = 0.0) -> bytes:
    """The whole file.

    Args:
        location: The file.
        patience_seconds: How long to wait for S3 that is unreachable.

    Raises:
        FileNotFoundError: Nothing is there.
        UnreachableError: Storage did not answer, or not within the patience.
        WorldError: Storage refused.
    """
    if not is_remote(location):
        return Path(location).read_bytes()

    def read() -> bytes:
        with s3_errors(location):
            return _get(location)["Body"].read()

    return patiently(location, patience_seconds, read)


def read_range(location: str, start: int, num_bytes: int, *, patience_seconds: float = 0.0) -> bytes:
    """``num_bytes`` bytes from offset ``start``; fewer at the end of the file. Raises as ``read_bytes``."""
    if not is_remote(location):
        with open(location, "rb") as file:
            file.seek(start)
            return file.read(num_bytes)
    return patiently(location, patience_seconds, lambda: _range(location, start, num_bytes))


def read_chunks(location: str, *, chunk_bytes: int = 8 * 2**20, patience_seconds: float = 0.0) -> Iterator[bytes]:
    """The file in pieces, with no more than one of them in memory.

    From S3 it is one streamed request. After an outage within the patience it goes on from the offset reached, and only
    in the object that it began with.

    Args:
        location: The file.
        chunk_bytes: Size of every piece but the last.
        patience_seconds: How long to wait, at each outage, for S3 that is unreachable.

    Raises:
        FileNotFoundError: Nothing is there.
        UnreachableError: Storage did not answer, or not within the patience.
        WorldError: Storage refused, or the object changed between two requests.
    """
    if not is_remote(location):
        with open(location, "rb") as file:
            while chunk := file.read(chunk_bytes):
                yield chunk
        return
    with closing(_Stream(location)) as stream:
        while chunk := patiently(location, patience_seconds, lambda: stream.read(chunk_bytes)):
            yield chunk


def open_binary(location: str, *, patience_seconds: float = 0.0) -> BinaryIO:
    """A seekable read-only file with a buffer of 1 MiB. Opening and reading raise as ``read_chunks``."""
    if not is_remote(location):
        return open(location, "rb", buffering=_BUFFER_BYTES)
    size, etag = patiently(location, patience_seconds, lambda: _version(location))
    return io.BufferedReader(_RemoteFile(location, size, etag, patience_seconds), _BUFFER_BYTES)


def _head(location: str) -> tuple[int, str]:
    """Size and ETag of an object."""
    bucket, key = split(location)
    with s3_errors(location):
        answer = s3().head_object(Bucket=bucket, Key=key)
    return answer["ContentLength"], answer["ETag"]


def _version(location: str) -> tuple[int, str]:
    """As ``_head``, but tells a missing bucket from a missing file."""
    try:
        return _head(location)
    except FileNotFoundError:
        # The answer to HEAD has no body that could name what is missing; the answer to GET has.
        _range(location, 0, 1)
        raise


def _get(location: str, byte_range: str = "", etag: str = "") -> "GetObjectOutputTypeDef":
    """Asks for an object, or a part of it, and only for the version of that ETag if one is given."""
    bucket, key = split(location)
    conditions = {name: value for name, value in (("Range", byte_range), ("IfMatch", etag)) if value}
    answer = s3().get_object(Bucket=bucket, Key=key, **conditions)  # type: ignore[arg-type]
    if etag and answer["ETag"] != etag:
        # A server that does not know If-Match.
        answer["Body"].close()
        raise WorldError(f"{location} changed while it was read; read it again")
    return answer


def _range(location: str, start: int, num_bytes: int, etag: str = "") -> bytes:
    from botocore.exceptions import ClientError

    # "bytes=5-4" is no range, and for what is no range S3 sends the whole object.
    if num_bytes <= 0:
        return b""
    with s3_errors(location):
        try:
            return _get(location, f"bytes={start}-{start + num_bytes - 1}", etag)["Body"].read()
        except ClientError as error:
            # Past the end of the file there are no bytes, as on a disk.
            if error.response.get("Error", {}).get("Code") == "InvalidRange":
                return b""
            raise


class _Stream:
    """An object read from front to back; after a failed read the next one asks anew from the offset reached."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._body: StreamingBody | None = None
        self._etag = ""
        self._offset = 0
        self._size = -1

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; none at the end."""
        # With the body still open the empty read at the end is not in vain: it verifies the length and the checksum.
        if self._body is None and self._offset == self._size:
            return b""
        try:
            with s3_errors(self._location):
                if self._body is None:
                    self._body = self._ask()
                chunk: bytes = self._body.read(num_bytes)
        except Exception:
            self.close()
            raise
        self._offset += len(chunk)
        return chunk

    def close(self) -> None:
        """Drops the connection."""
        if self._body is not None:
            self._body.close()
        self._body = None

    def _ask(self) -> "StreamingBody":
        answer = _get(self._location, f"bytes={self._offset}-" if self._offset else "", self._etag)
        if not self._offset:
            self._etag, self._size = answer["ETag"], answer["ContentLength"]
        return answer["Body"]


class _RemoteFile(io.RawIOBase):
    """An object as an unbuffered file: every read is one ranged request for the version that was opened."""

    def __init__(self, location: str, size: int, etag: str, patience_seconds: float) -> None:
        self.name = location
        self._size = size
        self._etag = etag
        self._patience_seconds = patience_seconds
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self.name}: cannot seek to {base + offset}, before the start of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        # The inherited one asks for 8 KiB at a time.
        return self._read(self._size)

    def _read(self, num_bytes: int) -> bytes:
        wanted = min(num_bytes, self._size - self._position)
        data = patiently(
            self.name, self._patience_seconds, lambda: _range(self.name, self._position, wanted, self._etag)
        )
        self._position += len(data)
        return data
