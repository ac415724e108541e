"""Shards of remote storage on a local disk, shared by all processes of a machine; the folder has a limit.

A file's name is its shard's sha256, so runs and data sets share what they have in common and nothing becomes stale.
Locks are ``flock`` on files of the folder: the kernel releases them when a process dies. A shard that is dropped while
somebody reads it stays readable for that reader, since its file is open; its space is free when the last one closes it.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline import storage
from pipeline.data.manifest import ShardInfo
from pipeline.errors import UserError, WorldError

__all__ = ["DiskCache"]

_WHOLE = ".tar"
_PARTIAL = ".partial"


class DiskCache:
    """Keeps the shards that were used last.

    Args:
        folder: A folder on a local disk; made if it is missing. Network file systems do not lock reliably.
        limit_bytes: Largest sum of the files' sizes.

    Raises:
        UserError: The folder cannot be made or written.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        """Makes the folder."""
        self._folder, self._limit_bytes = Path(folder).expanduser(), limit_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock("all"):
                pass
        except OSError as error:
            raise UserError(
                f"--cache-dir {folder}: {error.strerror or error}; give a folder that can be written"
            ) from error

    def open(self, location: str, info: ShardInfo, *, patience_seconds: float) -> int | None:
        """Opens a shard for reading, after fetching it if it is not there.

        Args:
            location: Where the shard lies in remote storage.
            info: Its entry in the manifest.
            patience_seconds: How long to wait for storage that does not answer.

        Returns:
            A file descriptor that the caller closes; None if what lies at ``location`` is not what the manifest says.

        Raises:
            FileNotFoundError: Nothing lies at ``location``.
            WorldError: Storage refused or did not answer, or the disk is full.
        """
        found = self._find(info)
        if found is not None:
            return found
        self._folder.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
        with self._lock(info.sha256[:2]):
            # Another process may have fetched it while this one waited for the lock.
            found = self._find(info)
            return self._fetch(location, info, patience_seconds) if found is None else found

    def _find(self, info: ShardInfo) -> int | None:
        path = self._folder / (info.sha256 + _WHOLE)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        os.utime(descriptor)  # used now: dropped last
        return descriptor

    def _fetch(self, location: str, info: ShardInfo, patience_seconds: float) -> int | None:
        partial = self._folder / (info.sha256 + _PARTIAL)
        try:
            self._reserve(partial, info.num_bytes)
            with partial.open("r+b") as file:
                if not self._copy(location, info, patience_seconds, file):
                    return None
                # Opened before anybody can find it and drop it again.
                descriptor = os.open(partial, os.O_RDONLY)
            with self._lock("all"):  # whoever adds up the sizes sees the file under one of its names
                partial.replace(partial.with_suffix(_WHOLE))
            return descriptor
        except _MissingSourceError as error:
            raise FileNotFoundError(location) from error
        except OSError as error:
            hint = "; give a smaller --cache-bytes" if error.errno == errno.ENOSPC else ""
            raise WorldError(f"cannot write to the cache {self._folder}: {error.strerror or error}{hint}") from error
        finally:
            partial.unlink(missing_ok=True)

    def _copy(self, location: str, info: ShardInfo, patience_seconds: float, file: BinaryIO) -> bool:
        """Whether what lies there is what the manifest says."""
        digest = hashlib.sha256()
        try:
            for chunk in storage.read_chunks(location, patience_seconds=patience_seconds):
                digest.update(chunk)
                if file.tell() + len(chunk) > info.num_bytes:  # more than the space reserved for it
                    return False
                file.write(chunk)
        except FileNotFoundError as error:
            raise _MissingSourceError from error
        return digest.hexdigest() == info.sha256

    def _reserve(self, partial: Path, num_bytes: int) -> None:
        """Drops the shards used longest ago until the new one fits, and takes its space."""
        with self._lock("all"):
            partial.unlink(missing_ok=True)  # of a dead process: this one holds the lock of its name
            for left_behind in self._folder.glob("*" + _PARTIAL):
                self._drop_if_dead(left_behind)
            files = sorted(self._folder.glob(f"*{_WHOLE}"), key=lambda path: _facts(path)[1])
            total = num_bytes + sum(_facts(path)[0] for path in [*files, *self._folder.glob("*" + _PARTIAL)])
            for path in files:
                if total <= self._limit_bytes:
                    break
                total -= _facts(path)[0]
                path.unlink(missing_ok=True)
            with partial.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))

    def _drop_if_dead(self, partial: Path) -> None:
        """Whoever fetches a shard holds the lock of its name; a file whose lock is free was left by a dead process."""
        try:
            with self._lock(partial.name[:2], wait=False):
                partial.unlink(missing_ok=True)
        except BlockingIOError:
            pass

    @contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        # One of 257 locks: a lock file for every shard would stay behind for every shard.
        descriptor = os.open(self._folder / f"lock-{name}", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            os.close(descriptor)


class _MissingSourceError(Exception):
    """Nothing lies in remote storage; told apart from a cache folder that is gone."""


def _facts(path: Path) -> tuple[int, int]:
    """Size and time of last use; zeros for a file that another process has just dropped or finished."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
