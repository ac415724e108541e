"""Which files there are: all of a folder, or those that match a pattern."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from braceexpand import braceexpand

from pipeline.errors import UserError
from pipeline.storage.locations import PARTIAL, is_remote, join, split
from pipeline.storage.s3_client import s3, s3_errors

__all__ = ["FileEntry", "expand", "list_entries", "list_files"]

_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a listing shows it."""

    location: str
    num_bytes: int
    etag: str
    """S3's tag of the content, quotes included; empty for a local file."""


def list_files(location: str) -> Iterator[str]:
    """Locations of all files under a folder, at any depth, sorted by name; nothing if it does not exist.

    Raises:
        UnreachableError: Storage did not answer.
        WorldError: Storage refused.
    """
    return (entry.location for entry in list_entries(location))


def list_entries(location: str) -> Iterator[FileEntry]:
    """As ``list_files``, with what the listing itself tells of each file."""
    return _remote_entries(location) if is_remote(location) else _local_entries(location)


def expand(pattern: str) -> list[str]:
    """Locations of the files that a pattern stands for, sorted, each once.

    Braces are expanded first, as in bash: ``train-{00000..00012}.tar``, ``{a,b}/x``. Then ``*``, ``?`` and ``[...]``
    match existing files within one part of the path; like a shell's they do not match a dot at its start. A name
    without wildcards is returned whether the file exists or not, so that a missing shard is missed by who reads it.

    Args:
        pattern: A local path or an ``s3://`` URI.

    Raises:
        UserError: The braces do not pair up, the bucket's name has a wildcard, or it is another URI scheme.
        UnreachableError: Storage did not answer.
        WorldError: Storage refused.
    """
    matches = _remote_matches if is_remote(pattern) else _local_matches
    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise UserError(
            f"{pattern!r}: its braces do not pair up; give for instance train-{{00000..00012}}.tar"
        ) from error
    return sorted({found for name in names for found in (matches(name) if _is_wild(name) else [name])})


def _local_entries(location: str) -> Iterator[FileEntry]:
    for path in sorted(map(str, Path(location).rglob("*"))):
        if not _is_whole(path):
            continue
        try:
            status = os.stat(path)
        except FileNotFoundError:
            # A link to nowhere, or a file that somebody removed since the folder was read.
            continue
        if stat.S_ISREG(status.st_mode):
            yield FileEntry(path, status.st_size, "")


def _remote_entries(location: str) -> Iterator[FileEntry]:
    bucket, prefix = split(location)
    with s3_errors(location):
        pages = (
            s3()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/" if prefix else "")
        )
        for page in pages:
            for entry in page.get("Contents", []):
                # Some clients mark folders by empty objects whose names end with a slash.
                if not entry["Key"].endswith("/"):
                    yield FileEntry(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"])


def _local_matches(pattern: str) -> Iterator[str]:
    """Goes down only into the folders that match so far."""
    folder, *parts = _at_first_wildcard(pattern)
    folders = [folder]
    for part in parts[:-1]:
        folders = [
            os.path.join(above, name)
            for above in folders
            for name in _names(above)
            if _matches(name, part) and os.path.isdir(os.path.join(above, name))
        ]
    for above in folders:
        paths = (os.path.join(above, name) for name in _names(above) if _matches(name, parts[-1]) and _is_whole(name))
        yield from (path for path in paths if os.path.isfile(path))


def _remote_matches(pattern: str) -> Iterator[str]:
    """Lists the longest folder without wildcards and filters, since S3 knows no patterns."""
    if _is_wild(split(pattern)[0]):
        raise UserError(f"{pattern!r}: the bucket's name may not have wildcards; give s3://bucket/prefix-*.tar")
    folder, *parts = _at_first_wildcard(pattern)
    for location in list_files(folder):
        names = location.removeprefix(join(folder, "")).split("/")
        if len(names) == len(parts) and all(map(_matches, names, parts)):
            yield location


def _at_first_wildcard(pattern: str) -> list[str]:
    """The folder above the first path part with a wildcard, then that part and the following ones."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if _is_wild(part))
    folder = "/".join(parts[:first])
    # Of "/*.tar" the root is left, of "*.tar" the working directory.
    return [folder or ("/" if first else ""), *parts[first:]]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except (FileNotFoundError, NotADirectoryError):
        return []


def _matches(name: str, part: str) -> bool:
    return fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))


def _is_wild(text: str) -> bool:
    return not _WILDCARDS.isdisjoint(text)


def _is_whole(name: str) -> bool:
    return not name.endswith(PARTIAL)
