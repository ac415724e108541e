"""``cifar10:PATH`` and ``cifar10-test:PATH``: the official binary archive, or the folder that it unpacks to.

A record is one byte with the label and 3,072 bytes with the red, the green and the blue plane of 32x32 pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.manifest import Fit
from pipeline.data.sources.base import FittedSource, Sample
from pipeline.data.sources.files import identity, open_container, reading
from pipeline.data.sources.members import refuse_large
from pipeline.data.sources.names import absolute
from pipeline.data.sources.tars import stream_members
from pipeline.errors import UserError

__all__ = ["Cifar10Source", "open_cifar10"]

RECORD_BYTES = 1 + 3 * 32 * 32
_TRAINING = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = ("test_batch.bin",)
_NAMES_FILE = "batches.meta.txt"
_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class Cifar10Source(FittedSource):
    """CIFAR-10, 32x32 RGB, in the order of its batches."""

    kind: str
    """cifar10 (training) or cifar10-test."""
    location: str
    is_archive: bool
    """A tar (True) or an unpacked folder (False)."""
    batches: tuple[tuple[str, int], ...]
    """Each batch with its number of records: its location, or in an archive its name there."""
    class_names: tuple[str, ...]
    identity: str

    @property
    def name(self) -> str:
        """The kind and the absolute path."""
        return f"{self.kind}:{self.location}"

    @property
    def reads_in_driver(self) -> bool:
        """True for an archive: it is compressed."""
        return self.is_archive

    def __len__(self) -> int:
        """50,000, or 10,000 for the test images."""
        return sum(count for _, count in self.batches)

    def inventory(self) -> str:
        """Size and ends of the files, and the records of each batch."""
        return f"{self.identity}; {[count for _, count in self.batches]}"

    def read(self, start: int, stop: int) -> list[Any]:
        """Records of 3,073 bytes; UserError if the archive is damaged."""
        items, first = [], 0
        for batch, count in self.batches:
            begin, end = max(start - first, 0), min(stop - first, count)
            if begin < end:
                data = self._read_batch(batch, begin, end)
                if len(data) != (end - begin) * RECORD_BYTES:
                    raise UserError(f"{batch} of {self.location} is cut off; download it again")
                items += [data[at : at + RECORD_BYTES] for at in range(0, len(data), RECORD_BYTES)]
            first += count
        return items

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """The records as images; UserError for a label without a name."""
        for index, record in enumerate(items, start):
            label, planes = record[0], np.frombuffer(record, np.uint8, offset=1).reshape(3, 32, 32)
            if label >= len(self.class_names):
                known = f"there are {len(self.class_names)} classes"
                raise UserError(f"{self.location}: image {index} has the label {label} and {known}; download it again")
            yield self.fit_array(index, planes.transpose(1, 2, 0), label)

    def _read_batch(self, batch: str, begin: int, end: int) -> bytes:
        if self.is_archive:
            return _batch_in_archive(self.location, self.identity, batch)[begin * RECORD_BYTES : end * RECORD_BYTES]
        with reading(batch):
            return storage.read_range(batch, begin * RECORD_BYTES, (end - begin) * RECORD_BYTES)


def open_cifar10(
    path: str, *, test: bool = False, image_size: int | None, image_channels: int | None, crop: Fit
) -> Cifar10Source:
    """Opens the archive (``cifar-10-binary.tar.gz``) or the folder; native 32x32 RGB unless told otherwise.

    Raises:
        UserError: Nothing there, a batch is missing or holds a part of a record.
    """
    kind = "cifar10-test" if test else "cifar10"
    location = absolute(path)
    is_archive = storage.exists(location)
    files, names = _list_archive(location) if is_archive else _list_folder(location)
    batches = []
    for batch in _TEST if test else _TRAINING:
        if batch not in files:
            what = "give cifar-10-binary.tar.gz (the binary version) or the folder it unpacks to"
            raise UserError(f"{kind}:{path}: there is no {batch} in {location}; {what}")
        place, size = files[batch]
        if size % RECORD_BYTES or not size:
            what = f"{size} bytes are not a whole number of records of {RECORD_BYTES}"
            raise UserError(f"{kind}:{path}: {batch} is damaged ({what}); download it again")
        batches.append((place, size // RECORD_BYTES))
    parts = [location] if is_archive else [place for place, _ in batches]
    return Cifar10Source(
        kind=kind,
        location=location,
        is_archive=is_archive,
        batches=tuple(batches),
        class_names=names or _NAMES,
        identity="; ".join(identity(part) for part in parts),
        image_size=image_size or 32,
        image_channels=image_channels or 3,
        crop=crop,
    )


def _list_archive(location: str) -> tuple[dict[str, tuple[str, int]], tuple[str, ...]]:
    files: dict[str, tuple[str, int]] = {}
    names: tuple[str, ...] = ()
    with open_container(location) as file:
        for info, tar in stream_members(file):
            base = info.name.rpartition("/")[2]
            if not info.isreg() or base not in (*_TRAINING, *_TEST, _NAMES_FILE):
                continue
            refuse_large(info.name, info.size, location)
            files[base] = (info.name, info.size)
            if base == _NAMES_FILE and (content := tar.extractfile(info)) is not None:
                names = _parse_names(content.read())
    return files, names


def _list_folder(location: str) -> tuple[dict[str, tuple[str, int]], tuple[str, ...]]:
    entries = list(storage.list_entries(location))
    files = {entry.location.rpartition("/")[2]: (entry.location, entry.num_bytes) for entry in entries}
    names = _parse_names(storage.read_bytes(files[_NAMES_FILE][0])) if _NAMES_FILE in files else ()
    return files, names


def _parse_names(data: bytes) -> tuple[str, ...]:
    return tuple(line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip())


@lru_cache(maxsize=1)
def _batch_in_archive(location: str, _identity: str, name: str) -> bytes:
    # Found by going through the archive once a batch: its batches lie in another order than their numbers.
    with open_container(location) as file:
        for info, tar in stream_members(file):
            if info.name == name and (content := tar.extractfile(info)) is not None:
                refuse_large(name, info.size, location)
                return content.read()
    raise UserError(f"there is no {name} in {location} any more; give the archive that was opened")
