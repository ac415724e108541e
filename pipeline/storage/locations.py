"""Names of places: absolute local paths and ``s3://`` URIs. Touches neither disk nor network."""

import os
from pathlib import Path

from pipeline.errors import UserError

__all__ = ["PARTIAL", "home", "is_remote", "join", "resolve", "split"]

PARTIAL = ".partial"
"""How the names of local files end while they are written; what a killed writer left is no file of anybody's."""


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


def split(location: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` URI.

    Raises:
        UserError: It names no bucket.
    """
    # Not urlsplit().path: a key may hold "?" and "#", which are no query and no fragment here.
    bucket, _, key = location.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{location!r} names no bucket; give s3://bucket/prefix")
    return bucket, key.lstrip("/")
