"""Names of files: which are images, and which class a folder gives them. Names are never used as paths here."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline import storage
from pipeline.data.sources.pixels import IMAGE_EXTENSIONS
from pipeline.errors import UserError

__all__ = ["absolute", "class_names", "class_of", "expand_files", "is_image"]


def absolute(path: str) -> str:
    """Makes a source's path absolute: a relative one lies in the working directory; an ``s3://`` URI stays."""
    return path.rstrip("/") if storage.is_remote(path) else str(Path(path).expanduser().absolute())


def expand_files(location: str, spec: str, extension: str) -> list[str]:
    """The files at an absolute location: one, those that a pattern stands for, or those of a folder, sorted.

    Args:
        location: A file, a folder or a pattern.
        spec: What to call it in errors.
        extension: Of the files to take from a folder, with its dot.

    Raises:
        UserError: There are none.
    """
    if storage.exists(location):
        locations = [location]
    elif any(character in location for character in "*?[{"):
        locations = storage.expand(location)
    else:
        locations = sorted(entry.location for entry in storage.list_entries(location))
        locations = [each for each in locations if each.endswith(extension)]
    if not locations:
        raise UserError(f"{spec}: no files at {location}; give a {extension} file, a folder or a pattern")
    return locations


def is_image(file: str) -> bool:
    """Whether the name is that of an image and no part of it is hidden."""
    path = PurePosixPath(file)
    # Hidden files are what desktops and notebooks leave behind (._photo.jpg, .ipynb_checkpoints/), not images.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in IMAGE_EXTENSIONS and not hidden


def class_of(file: str) -> str:
    """The first folder of a relative name; empty if it lies in none."""
    first, slash, _ = file.partition("/")
    return first if slash else ""


def class_names(root: str, files: Sequence[str]) -> tuple[str, ...]:
    """The sorted classes of relative names; none if all files lie loose.

    Raises:
        UserError: Some files lie in class folders and some beside them.
    """
    names = {class_of(file) for file in files}
    if names <= {""}:
        return ()
    if "" in names:
        loose = next(file for file in files if not class_of(file))
        raise UserError(f"{root}: {loose} lies beside the class folders; move all images into class folders, or none")
    return tuple(sorted(names))
