"""What is measured, and the data set that it is compared with."""

from dataclasses import dataclass

from pipeline.data.manifest import Manifest, load_manifest
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.actors import ModelFiles
from pipeline.model_folder import Meta

__all__ = ["Model", "OutOfTimeError", "reference_of"]


class OutOfTimeError(Exception):
    """``--max-minutes`` are over; the chunks so far are kept."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured."""

    name: str
    """In words, for messages."""
    files: ModelFiles
    meta: Meta
    images: str | None
    """Where its images are to be saved."""


def reference_of(location: str, model: Model, *, digest: str | None = None) -> Manifest:
    """The data set that a model is compared with.

    Args:
        location: The data set.
        model: Whose images must have its size and channels.
        digest: What the data set was when the model was trained; None: any will do.

    Raises:
        UserError: No data set, or one of another size or number of channels.
        WorldError: The data set is not what it was, or storage does not answer.
    """
    manifest, made = load_manifest(location), model.meta.config.model
    if (manifest.image_size, manifest.image_channels) != (made.image_size, made.image_channels):
        theirs, ours = (_shape(size, n) for size, n in (
            (manifest.image_size, manifest.image_channels), (made.image_size, made.image_channels)
        ))  # fmt: skip
        raise UserError(
            f"{location} holds images of {theirs}, {model.name} makes {ours}; give a data set of that shape"
        )
    if digest is not None and manifest.digest != digest:
        raise WorldError(
            f"{location} is no longer the data set that {model.name} was trained on "
            f"(digest {manifest.digest[:12]}, was {digest[:12]})"
        )
    return manifest


def _shape(size: int, channels: int) -> str:
    return f"{channels}x{size}x{size}"
