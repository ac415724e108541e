"""The one seam to bytes: local paths and ``s3://`` URIs behind the same eight functions.

A *location* is an absolute local path (``/data/cifar10``) or an S3 URI (``s3://bucket/prefix``). Writes appear whole or
not at all. Endpoint, region and credentials of S3 come from the standard AWS environment and files; they never pass
through here.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.errors import UserError, WorldError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = [
    "exists",
    "home",
    "is_remote",
    "join",
    "list_files",
    "read_bytes",
    "read_range",
    "resolve",
    "sha256_hex",
    "write_bytes",
]


def home() -> str:
    """The root under which data sets, checkpoints and the default MLflow store live.

    ``$DDPM_HOME`` (a path or an ``s3://`` URI), else ``ddpm-ray`` in the user's data folder. It does not depend on the
    working directory, so that a submitted job, whose working directory is a temporary copy, sees the same runs.
    """
    given = os.environ.get("DDPM_HOME")
    if given:
        return given.rstrip("/") if is_remote(given) else str(Path(given).expanduser().absolute())
    data_folder = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(data_folder) / "ddpm-ray")


def resolve(location: str, *folder: str) -> str:
    """Makes a location absolute: a relative one lies under ``home()/folder``, never under the working directory."""
    if is_remote(location):
        return location.rstrip("/")
    path = Path(location).expanduser()
    return str(path) if path.is_absolute() else join(home(), *folder, location)


def is_remote(location: str) -> bool:
    """Whether the location is an ``s3://`` URI.

    Raises:
        UserError: Another URI scheme.
    """
    scheme = location.partition("://")[0] if "://" in location else ""
    if scheme not in ("", "s3"):
        raise UserError(f"{location!r}: scheme {scheme}:// is not supported; give a local path or s3://bucket/prefix")
    return scheme == "s3"


def join(location: str, *parts: str) -> str:
    """Appends path parts to a location."""
    return "/".join([location.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(location: str) -> bool:
    """Whether a file (not a folder) is there."""
    if not is_remote(location):
        return Path(location).is_file()
    bucket, key = _split(location)
    try:
        with _s3_errors(location):
            _s3().head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def list_files(location: str) -> Iterator[str]:
    """Locations of all files under a folder, at any depth, sorted by name; nothing if it does not exist."""
    if not is_remote(location):
        root = Path(location)
        yield from sorted(str(path) for path in root.rglob("*") if path.is_file() and not _is_partial(path.name))
        return
    bucket, prefix = _split(location)
    with _s3_errors(location):
        pages = (
            _s3()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/" if prefix else "")
        )
        for page in pages:
            # Some clients mark folders by empty objects whose names end with a slash.
            keys = (entry["Key"] for entry in page.get("Contents", []))
            yield from (f"s3://{bucket}/{key}" for key in keys if not key.endswith("/"))


def read_bytes(location: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: Nothing is there.
        WorldError: Storage refused or did not answer.
    """
    if not is_remote(location):
        return Path(location).read_bytes()
    bucket, key = _split(location)
    with _s3_errors(location):
        return _s3().get_object(Bucket=bucket, Key=key)["Body"].read()


def read_range(location: str, start: int, num_bytes: int) -> bytes:
    """``num_bytes`` bytes from offset ``start``; fewer at the end of the file. Raises as ``read_bytes``."""
    if not is_remote(location):
        with open(location, "rb") as file:
            file.seek(start)
            return file.read(num_bytes)
    bucket, key = _split(location)
    with _s3_errors(location):
        return _s3().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + num_bytes - 1}")["Body"].read()


def write_bytes(location: str, data: bytes) -> None:
    """Writes a file whole or not at all: a reader sees the old bytes or the new ones, never a part.

    Raises:
        WorldError: The disk is full, the folder is not writable, or S3 refused.
    """
    if is_remote(location):
        bucket, key = _split(location)
        with _s3_errors(location):
            _s3().put_object(Bucket=bucket, Key=key, Body=data)
        return
    path = Path(location)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f"{path.name}.", suffix=_PARTIAL, delete=False
        ) as file:
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


def sha256_hex(data: bytes) -> str:
    """The sha256 of some bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


_PARTIAL = ".partial"


def _is_partial(name: str) -> bool:
    return name.endswith(_PARTIAL)


def _umask() -> int:
    # There is no call that reads the mask without setting it; the two calls restore it at once.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _split(location: str) -> tuple[str, str]:
    parts = urlsplit(location)
    if not parts.netloc:
        raise UserError(f"{location!r} names no bucket; give s3://bucket/prefix")
    return parts.netloc, parts.path.lstrip("/")


@lru_cache(maxsize=1)
def _s3_of_process(_pid: int) -> "S3Client":
    import boto3
    from botocore.config import Config

    path_style: Any = {"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {}
    return boto3.client("s3", config=Config(retries={"mode": "adaptive", "max_attempts": 5}, s3=path_style))


def _s3() -> "S3Client":
    # One client a process: a client that crosses a fork shares its sockets with the parent.
    return _s3_of_process(os.getpid())


@contextmanager
def _s3_errors(location: str) -> Iterator[None]:
    """Turns botocore's errors into ``FileNotFoundError`` or one clear ``WorldError`` line that names the location."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))
        if code in ("404", "NoSuchKey", "NotFound"):
            raise FileNotFoundError(location) from error
        message = error.response.get("Error", {}).get("Message", "")
        raise WorldError(f"S3 refused {location}: {code} {message}".strip()) from error
    except BotoCoreError as error:
        raise WorldError(f"cannot reach {location}: {error}") from error
