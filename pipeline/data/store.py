"""The bytes of images: shards are opened ahead of their use, by threads, in bounded memory.

Three ways to a shard's bytes. ``files``: from a local file, or a remote one kept in the disk cache, image by image; the
page cache of the system is the only memory used. ``memory``: a remote shard is fetched whole. ``ranges``: where whole
shards do not fit into memory and there is no disk cache, each image is fetched by a request of its own.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from pipeline import storage
from pipeline.data.disk_cache import DiskCache
from pipeline.data.faults import DataError
from pipeline.data.manifest import Manifest, ShardIndex, shard_location
from pipeline.data.order import Position
from pipeline.data.shards import read_index, sha256_head
from pipeline.data.threads import Threads
from pipeline.errors import WorldError

__all__ = ["INDEX_BYTES_PER_IMAGE", "Access", "OpenShard", "ShardStore"]

Access = Literal["files", "memory", "ranges"]

INDEX_BYTES_PER_IMAGE = 150
"""Memory of an image's entry in an open shard's index: four numbers and the key as a Python string."""
_MAX_OPEN_SHARDS = 512  # each may hold a file descriptor
_SHARD_THREADS = 8
_IMAGE_THREADS = 16


class _Bytes(Protocol):
    """A shard's bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; fewer where the shard ends."""

    @property
    def close(self) -> Callable[[], object]:
        """Gives back what is held."""


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A shard whose index is at hand."""

    name: str
    index: ShardIndex
    content: _Bytes

    def read(self, image: int) -> bytes:
        """An image file, held against the index.

        Raises:
            DataError: The shard ends before it, or it was altered.
            WorldError: Storage refused or did not answer.
        """
        index = self.index
        offset, size = int(index.offsets[image]), int(index.sizes[image])
        data = self.content.read(offset, size)
        if len(data) != size:
            reason = f"the shard is cut off: {size} bytes expected there, {len(data)} found"
            raise DataError(self.name, reason, key=index.keys[image], offset=offset)
        if sha256_head(data) != int(index.sha256_heads[image]):
            reason = f"its bytes were altered: wrong sha256 (expected {int(index.sha256_heads[image]):016x}...)"
            raise DataError(self.name, reason, key=index.keys[image], offset=offset)
        return data


class ShardStore:
    """Opens shards before they are needed and keeps those in use.

    Args:
        location: The data set's folder.
        manifest: Its manifest.
        access: How remote shards are read; local ones are always read as files.
        cache: Where remote shards are kept on disk; needs access "files".
        budget_bytes: Memory for whole shards (access "memory") and for indexes; what the present batch needs is held
            even above it.
        patience_seconds: How long to wait for storage that does not answer.
    """

    def __init__(
        self,
        location: str,
        manifest: Manifest,
        *,
        access: Access,
        cache: DiskCache | None,
        budget_bytes: int,
        patience_seconds: float,
    ) -> None:
        """Opens nothing yet."""
        self._location, self._manifest, self._access, self._cache = location, manifest, access, cache
        self._budget_bytes, self._patience_seconds = budget_bytes, patience_seconds
        self._shards: dict[int, Future[OpenShard]] = {}  # in order of use
        self._images: dict[Position, Future[bytes]] = {}
        self._opening = Threads(_SHARD_THREADS, "data-shards")
        self._fetching = Threads(_IMAGE_THREADS if access == "ranges" else 0, "data-images")

    def expect(self, needed: Iterable[int], soon: Iterable[int]) -> None:
        """Begins to open shards: those needed now, then, as far as the budget goes, those needed soon; drops others."""
        kept = dict.fromkeys(needed)
        total = sum(self._cost(shard) for shard in kept)
        for shard in soon:
            if shard in kept:
                continue
            total += self._cost(shard)
            if total > self._budget_bytes or len(kept) >= _MAX_OPEN_SHARDS:
                break
            kept[shard] = None
        self._make_room(kept.keys())
        for shard in kept:
            if shard not in self._shards:
                self._shards[shard] = self._opening.submit(partial(self._open, shard))

    def has_all(self, shards: Iterable[int]) -> bool:
        """Whether all of these are open or being opened."""
        return all(shard in self._shards for shard in shards)

    def expect_images(self, positions: Iterable[Position]) -> None:
        """Begins to fetch single images, and forgets those no longer expected; only for access "ranges"."""
        before = self._images
        self._images = {
            position: before.get(position) or self._fetching.submit(partial(self._fetch, position))
            for position in positions
        }

    def shard(self, number: int) -> OpenShard:
        """An open shard; waits for it.

        Raises:
            DataError: It or its index is missing or altered.
            WorldError: Storage refused or did not answer.
        """
        future = self._shards.pop(number, None)
        if future is None:
            self._make_room({number})
            future = self._opening.submit(partial(self._open, number))
        self._shards[number] = future  # used last
        return future.result()

    @contextmanager
    def aside(self, number: int) -> Iterator[OpenShard]:
        """Like ``shard`` for a single image: does not fetch a whole remote shard, and nothing is kept."""
        if number in self._shards:
            yield self.shard(number)
            return
        shard = self._open(number, aside=True)
        try:
            yield shard
        finally:
            shard.content.close()

    def read(self, shard: OpenShard, position: Position) -> bytes:
        """An image file of an open shard, expected before or not. Raises as ``OpenShard.read``."""
        future = self._images.pop(position, None)
        return shard.read(position[1]) if future is None else future.result()

    def close(self) -> None:
        """Ends the threads (one that waits for storage ends when that answers) and closes files."""
        self._opening.stop()
        self._fetching.stop()
        for number in list(self._shards):
            self._drop(number)

    def _fetch(self, position: Position) -> bytes:
        number, image = position
        future = self._shards.get(number)
        # Not ``shard``, which changes the order of use: that is for the reader's thread alone.
        if future is not None:
            return future.result().read(image)
        with self.aside(number) as shard:
            return shard.read(image)

    def _cost(self, shard: int) -> int:
        info = self._manifest.shards[shard]
        index = info.num_images * INDEX_BYTES_PER_IMAGE
        return index + (info.num_bytes if self._access == "memory" else 0)

    def _make_room(self, kept: Set[int]) -> None:
        total = sum(self._cost(shard) for shard in self._shards.keys() | kept)
        for shard in [shard for shard in self._shards if shard not in kept]:
            if total <= self._budget_bytes and len(self._shards.keys() | kept) <= _MAX_OPEN_SHARDS:
                return
            self._drop(shard)
            total -= self._cost(shard)

    def _drop(self, number: int) -> None:
        future = self._shards.pop(number)
        future.add_done_callback(_close_content)

    def _open(self, number: int, *, aside: bool = False) -> OpenShard:
        info = self._manifest.shards[number]
        path = shard_location(self._location, info.name)
        index = read_index(self._location, self._manifest, number, patience_seconds=self._patience_seconds)
        try:
            return OpenShard(path, index, self._content(path, number, aside))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(path, f"it is missing; the manifest expects {info.num_bytes} bytes") from error
        except OSError as error:
            raise WorldError(f"cannot read shard {path}: {error.strerror or error}") from error

    def _content(self, path: str, number: int, aside: bool) -> _Bytes:
        patience = self._patience_seconds
        if not storage.is_remote(path):
            return _File(os.open(path, os.O_RDONLY), path)
        if self._cache is not None and not aside:
            descriptor = self._cache.open(path, self._manifest.shards[number], patience_seconds=patience)
            # A damaged shard is not kept; what is whole in it can still be read.
            return _Ranges(path, patience) if descriptor is None else _File(descriptor, path)
        if self._access == "memory" and not aside:
            return _Memory(storage.read_bytes(path, patience_seconds=patience))
        return _Ranges(path, patience)


class _File:
    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor, self._path = descriptor, path
        self.close = weakref.finalize(self, os.close, descriptor)
        # Images are read in random order, which defeats the system's own reading ahead.
        with suppress(OSError, AttributeError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise WorldError(f"cannot read shard {self._path} at byte {offset}: {error.strerror or error}") from error


class _Memory:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def close(self) -> None:
        self._data = b""


class _Ranges:
    def __init__(self, path: str, patience_seconds: float) -> None:
        self._path, self._patience_seconds = path, patience_seconds

    def read(self, offset: int, size: int) -> bytes:
        try:
            return storage.read_range(self._path, offset, size, patience_seconds=self._patience_seconds)
        except FileNotFoundError as error:
            raise DataError(self._path, "it is missing") from error

    def close(self) -> None:
        pass


def _close_content(future: "Future[OpenShard]") -> None:
    if future.exception() is None:
        future.result().content.close()
