"""Labels that are numbers: checked, and named where nothing else names them."""

from collections.abc import Sequence

from pipeline.errors import UserError

__all__ = ["MAX_CLASSES", "checked_labels", "number_names"]

MAX_CLASSES = 100_000
"""A larger label is an id or a measurement, not a class."""


def checked_labels(labels: Sequence[int], name: str) -> tuple[int, ...]:
    """The labels, each in [0, ``MAX_CLASSES``).

    Raises:
        UserError: A label outside, with ``name``, which says where they come from.
    """
    outside = next((label for label in labels if not 0 <= label < MAX_CLASSES), None)
    if outside is not None:
        raise UserError(f"{name}: label {outside} is not a class; labels must be 0, 1, ... below {MAX_CLASSES}")
    return tuple(labels)


def number_names(labels: Sequence[int]) -> tuple[str, ...]:
    """Names ``0``, ``1``, ... up to the largest label; none without labels."""
    return tuple(str(label) for label in range(max(labels) + 1)) if labels else ()
