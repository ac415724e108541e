"""``npy:PATH`` and ``npz:PATH``: one NumPy array of images, read by ranges. Nothing is ever unpickled."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.manifest import Fit
from pipeline.data.sources.array_headers import ArrayHeader, read_npy_header
from pipeline.data.sources.base import FittedSource, Sample
from pipeline.data.sources.files import identity, open_container, reading
from pipeline.data.sources.forward import Forward
from pipeline.data.sources.labels import number_names
from pipeline.data.sources.names import absolute
from pipeline.data.sources.npz import open_npz, stream_rows
from pipeline.errors import UserError

__all__ = ["ArraySource", "open_npy", "open_npz_source"]


@dataclass(frozen=True, kw_only=True)
class ArraySource(FittedSource):
    """Images of an array uint8 [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W]."""

    kind: str
    """npy or npz."""
    location: str
    header: ArrayHeader
    labels: tuple[int, ...]
    """One for each image; empty when there are none."""
    class_names: tuple[str, ...]
    identity: str
    stream: Forward | None = field(compare=False, repr=False)
    """Of a compressed npz, which is read from its beginning."""

    @property
    def name(self) -> str:
        """The kind and the absolute path."""
        return f"{self.kind}:{self.location}"

    @property
    def reads_in_driver(self) -> bool:
        """True for a compressed npz."""
        return self.stream is not None

    def __len__(self) -> int:
        """Length of the array."""
        return len(self.header)

    def inventory(self) -> str:
        """Size and ends of the file, and the shape."""
        return f"{self.identity}; {self.header.shape}"

    def read(self, start: int, stop: int) -> list[Any]:
        """The bytes of each image; UserError if the file is damaged."""
        row = self.header.row_bytes
        if self.stream is not None:
            items = self.stream.take(start, stop)
        else:
            with reading(self.location):
                data = storage.read_range(self.location, self.header.offset + start * row, (stop - start) * row)
            items = [data[at : at + row] for at in range(0, len(data), row)]
        if len(items) != stop - start or any(len(item) != row for item in items):
            raise UserError(f"{self.location} is cut off; download or save it again")
        return items

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """The rows as images."""
        for index, item in enumerate(items, start):
            array = self.header.as_picture(np.frombuffer(item, np.uint8))
            yield self.fit_array(index, array, self.labels[index] if self.labels else None)


def open_npy(path: str, *, image_size: int | None, image_channels: int | None, crop: Fit) -> ArraySource:
    """Opens an npy file; the native size if the images are square, and the native channels, unless told otherwise.

    Raises:
        UserError: No such file, another dtype or shape, or not square and no ``image_size``.
    """
    location = absolute(path)
    with open_container(location) as file:
        header = read_npy_header(file, location)
    if storage.num_bytes(location) < header.offset + len(header) * header.row_bytes:
        raise UserError(f"{location} is cut off; download or save it again")
    return ArraySource(
        kind="npy",
        location=location,
        header=header,
        labels=(),
        class_names=(),
        identity=identity(location),
        stream=None,
        image_size=image_size or header.native_size(location),
        image_channels=image_channels or header.channels,
        crop=crop,
    )


def open_npz_source(path: str, *, image_size: int | None, image_channels: int | None, crop: Fit) -> ArraySource:
    """Opens an npz file as ``open_npy``, with its labels if there are any; they are the numbers of the classes.

    Raises:
        UserError: As ``open_npy``; or no array of a known name, or labels that do not fit.
    """
    location = absolute(path)
    found = open_npz(location)
    return ArraySource(
        kind="npz",
        location=location,
        header=found.header,
        labels=found.labels,
        class_names=number_names(found.labels),
        identity=identity(location),
        stream=Forward(partial(stream_rows, location, found.member)) if found.is_compressed else None,
        image_size=image_size or found.header.native_size(location),
        image_channels=image_channels or found.header.channels,
        crop=crop,
    )
