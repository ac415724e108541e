"""Which columns of a Parquet file are the images and the labels, and what the classes are called."""

import json
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import UserError

__all__ = ["Columns", "find_columns"]

_IMAGES = ("image", "img", "jpg", "png", "webp")
_LABELS = ("label", "labels", "fine_label")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that matter."""

    image: str
    label: str | None
    label_is_text: bool
    class_names: tuple[str, ...] | None
    """From the metadata that Hugging Face's datasets writes; None if it is silent, for example about text."""

    @property
    def to_read(self) -> tuple[str, ...]:
        """Names of the columns."""
        return (self.image,) if self.label is None else (self.image, self.label)


def find_columns(schema: pa.Schema, location: str) -> Columns:
    """Finds the image and the label column by name and type.

    Raises:
        UserError: No image column or several, or labels that are neither integers nor text.
    """
    image = _image_column(schema, location)
    label = next((name for name in _LABELS if name in schema.names and name != image), None)
    is_text = label is not None and _is_text(schema.field(label).type)
    if label is not None and not is_text and not pa.types.is_integer(schema.field(label).type):
        found = f"column {label!r} is {schema.field(label).type}"
        raise UserError(f"{location}: {found}; labels must be integers or text: convert, rename or drop it")
    names = None if label is None or is_text else _class_label_names(schema, label)
    return Columns(image=image, label=label, label_is_text=is_text, class_names=names)


def _image_column(schema: pa.Schema, location: str) -> str:
    candidates = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in _IMAGES if name in candidates]
    if named:
        return named[0]
    if len(candidates) == 1:
        return str(candidates[0])
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    needed = f"name the one with the images {', '.join(_IMAGES[:-1])} or {_IMAGES[-1]}; its type must be binary"
    raise UserError(f"{location}: {len(candidates)} of its columns can be images: {columns}; {needed}")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _is_binary(kind.field(position).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _class_label_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None
