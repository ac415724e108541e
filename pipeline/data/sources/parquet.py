"""``parquet:PATTERN``: images in Parquet files, as Hugging Face's datasets stores them or as plain binary."""

import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import Fit
from pipeline.data.sources.base import FittedSource, Sample
from pipeline.data.sources.files import identity, open_container
from pipeline.data.sources.labels import checked_labels, number_names
from pipeline.data.sources.names import absolute, expand_files
from pipeline.data.sources.parquet_columns import Columns, find_columns
from pipeline.errors import UserError

__all__ = ["ParquetSource", "open_parquet"]


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Rows that lie together in a file and are read together."""

    location: str
    number: int
    first: int
    """Index of its first image in the source."""
    first_in_file: int
    """Row of its first image in its file."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource(FittedSource):
    """Images of one or more Parquet files, in the order of files and rows."""

    pattern: str
    row_groups: tuple[RowGroup, ...]
    num_images: int
    columns: Columns
    class_names: tuple[str, ...]
    identities: tuple[tuple[str, str], ...]
    """Location and identity of each file."""
    reads_in_driver: bool = False

    @property
    def name(self) -> str:
        """``parquet:`` and the absolute pattern."""
        return f"parquet:{self.pattern}"

    def __len__(self) -> int:
        """Number of rows."""
        return self.num_images

    def inventory(self) -> str:
        """Names, sizes and ends of the files: a Parquet file ends with counts, sizes and statistics of its columns."""
        return json.dumps([self.identities, self.columns.to_read])

    def read(self, start: int, stop: int) -> list[Any]:
        """Pairs of the bytes of an image file and the label as stored, None without labels.

        Raises:
            UserError: An image or a label is missing, or a file is damaged.
        """
        items: list[Any] = []
        for group in self.row_groups[self._group_of(start) : self._group_of(stop - 1) + 1]:
            table = _row_group(group, self.columns.to_read)
            begin = max(start - group.first, 0)
            for row, item in enumerate(_pairs(table.slice(begin, stop - group.first - begin), self.columns), begin):
                _refuse_missing(item, self.columns, f"row {group.first_in_file + row} of {group.location}")
                items.append((item[0]["bytes"] if isinstance(item[0], dict) else item[0], item[1]))
        return items

    def samples(self, start: int, items: list[Any]) -> Iterator[Sample]:
        """Decodes the images; UserError if one is none, or its label is out of range."""
        known = {name: label for label, name in enumerate(self.class_names)}
        for index, (data, value) in enumerate(items, start):
            group = self.row_groups[self._group_of(index)]
            place = f"row {index - group.first + group.first_in_file} of {group.location}"
            label = None if self.columns.label is None else known.get(value, value)
            if label is not None and not (isinstance(label, int) and 0 <= label < len(self.class_names)):
                named = f"the classes are 0 to {len(self.class_names) - 1}"
                raise UserError(f"{place}: label {value} has no name; {named}; leave the row out or drop the column")
            yield self.fit_file(index, data, label, place)

    def _group_of(self, index: int) -> int:
        return bisect_right(self.row_groups, index, key=lambda group: group.first) - 1


def open_parquet(pattern: str, *, image_size: int | None, image_channels: int | None, crop: Fit) -> ParquetSource:
    """Reads the footers, and the labels where only they say which classes there are; RGB unless told otherwise.

    Raises:
        UserError: No such files, no image column, files of different kinds, no ``image_size``.
    """
    if image_size is None:
        raise UserError(f"parquet:{pattern} needs a size to resize its images to; give --image-size, for example 32")
    location = absolute(pattern)
    locations = expand_files(location, f"parquet:{pattern}", ".parquet")
    groups: list[RowGroup] = []
    num_images = 0
    columns = None
    for file in locations:
        with _opened(file) as parquet:
            found = find_columns(parquet.schema_arrow, file)
            if columns not in (None, found):
                what = "has other image or label columns or other class names"
                raise UserError(f"{file} {what} than {locations[0]}; give files of one data set")
            columns, first_in_file = found, 0
            for number in range(parquet.metadata.num_row_groups):
                num_rows = parquet.metadata.row_group(number).num_rows
                if num_rows:
                    groups.append(RowGroup(location=file, number=number, first=num_images, first_in_file=first_in_file))
                num_images, first_in_file = num_images + num_rows, first_in_file + num_rows
    if columns is None or not groups:
        raise UserError(f"parquet:{pattern}: no rows in {location}; give files with images")
    return ParquetSource(
        pattern=location,
        row_groups=tuple(groups),
        num_images=num_images,
        columns=columns,
        class_names=_class_names(locations, columns),
        identities=tuple((file, identity(file)) for file in locations),
        image_size=image_size,
        image_channels=image_channels or 3,
        crop=crop,
    )


def _class_names(locations: list[str], columns: Columns) -> tuple[str, ...]:
    if columns.label is None or columns.class_names is not None:
        return columns.class_names or ()
    values: set[Any] = set()
    for file in locations:
        with _opened(file) as parquet:
            for batch in parquet.iter_batches(columns=[columns.label]):
                values |= set(batch.column(0).unique().to_pylist())
    if None in values:
        raise UserError(f"column {columns.label!r} of {locations[0]} has empty rows; fill them or drop the column")
    return (
        tuple(sorted(values)) if columns.label_is_text else number_names(checked_labels(sorted(values), locations[0]))
    )


@contextmanager
def _opened(location: str) -> Iterator[pq.ParquetFile]:
    with open_container(location) as file:
        try:
            with pq.ParquetFile(file) as parquet:
                yield parquet
        except pa.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{location} is no Parquet file that can be read ({reason}); download it again") from error


@lru_cache(maxsize=1)
def _row_group(group: RowGroup, columns: tuple[str, ...]) -> pa.Table:
    # Kept: the end of one shard and the beginning of the next often lie in the same row group.
    with _opened(group.location) as parquet:
        return parquet.read_row_group(group.number, columns=list(columns))


def _pairs(table: pa.Table, columns: Columns) -> Iterator[tuple[Any, Any]]:
    images = table.column(columns.image).to_pylist()
    labels = table.column(columns.label).to_pylist() if columns.label is not None else [None] * len(images)
    return zip(images, labels, strict=True)


def _refuse_missing(item: tuple[Any, Any], columns: Columns, place: str) -> None:
    image, label = item
    if image is None or (isinstance(image, dict) and image["bytes"] is None):
        if image is not None and image.get("path"):
            raise UserError(f"{place} has only the path of an image, not its bytes; embed the bytes in the file")
        raise UserError(f"{place} has no image in column {columns.image!r}; fill it or leave the row out")
    if label is None and columns.label is not None:
        raise UserError(f"{place} has no {columns.label!r}; fill it, leave the row out or drop the column")
