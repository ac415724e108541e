"""Shards: WebDataset tar files of images, and the manifest that makes a folder of them a data set.

A data set is a folder with ``shard-000000.tar``, ``shard-000001.tar``, ... and ``manifest.json``. The manifest is
written last: its presence means that the data set is whole. Stock WebDataset reads the shards; nothing in them is ever
unpickled.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import webdataset

from pipeline import storage
from pipeline.data.sources import Sample
from pipeline.errors import UserError, WorldError
from pipeline.images import encode_png

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "EncodedSample", "Manifest", "ShardInfo"]
__all__ += ["encode_shard", "load_manifest", "parse_shard", "read_shard", "shard_name"]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
IMAGE_FORMAT = "png"


@dataclass(frozen=True)
class EncodedSample:
    """One image as it lies in a shard: its key, the bytes of the image file, the label or None."""

    key: str
    image: bytes
    label: int | None


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest knows of a shard; ``read_shard`` holds the shard against it."""

    name: str
    num_images: int
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, name: str, data: bytes, num_images: int) -> "ShardInfo":
        """Describes a shard's bytes."""
        return cls(name=name, num_images=num_images, num_bytes=len(data), sha256=storage.sha256_hex(data))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole data set.

    Attributes:
        format_version: Layout of the folder and of this record.
        source: The source in words, for a reader.
        source_fingerprint: Identity of the source and of the options; prepare recognises its own work by it.
        image_size: Height and width of every image, in pixels.
        image_channels: 1 (grey) or 3 (RGB).
        class_names: Names of the labels 0, 1, ...; empty when the images have no labels.
        image_format: File format of the images in the shards.
        num_images: Images in all shards.
        shards: All shards, in order of name.
    """

    format_version: int = FORMAT_VERSION
    source: str
    source_fingerprint: str
    image_size: int
    image_channels: int
    class_names: tuple[str, ...]
    image_format: str = IMAGE_FORMAT
    num_images: int
    shards: tuple[ShardInfo, ...]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Number of images in each shard."""
        return tuple(shard.num_images for shard in self.shards)

    @property
    def digest(self) -> str:
        """Identity of the content: sha256 over what a model trained on it could notice, not over where it came from."""
        content = {
            "image_size": self.image_size,
            "image_channels": self.image_channels,
            "class_names": self.class_names,
            "shards": [shard.sha256 for shard in self.shards],
        }
        return storage.sha256_hex(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Parses ``to_json``.

        Raises:
            UserError: Not JSON, another format version, missing fields, or numbers that do not add up.
        """
        try:
            return _parse_manifest(json.loads(text))
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"not a readable manifest ({type(error).__name__}: {error})") from error


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:06d}.tar"


def encode_shard(samples: Iterable[Sample]) -> bytes:
    """Packs samples into a WebDataset tar: ``KEY.png`` and, with a label, ``KEY.cls``. Same samples, same bytes."""
    buffer = io.BytesIO()
    # The default mtime is the clock: it would change the bytes at every run and add a pax header to every member.
    options: dict[str, Any] = {"mtime": 0, "user": "ddpm", "group": "ddpm", "mode": 0o444, "encoder": False}
    with webdataset.TarWriter(buffer, **options) as writer:
        for sample in samples:
            members: dict[str, Any] = {"__key__": sample.key, IMAGE_FORMAT: encode_png(sample.pixels)}
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            writer.write(members)
    return buffer.getvalue()


def parse_shard(name: str, data: bytes) -> list[EncodedSample]:
    """Takes a shard's bytes apart, in the order written; nothing is decoded.

    Raises:
        WorldError: Not a tar file of images; names the shard.
    """
    try:
        # The default handler of both stages re-raises; a handler that carries on would lose the rest of the shard.
        files = webdataset.tariterators.tar_file_expander([{"url": name, "stream": io.BytesIO(data)}])
        return [_encoded_sample(group) for group in webdataset.tariterators.group_by_keys(files)]
    except (tarfile.TarError, ValueError, KeyError, OSError, EOFError) as error:
        raise WorldError(f"shard {name} is not a tar file of labelled images: {error}; prepare it again") from error


def read_shard(location: str, info: ShardInfo) -> list[EncodedSample]:
    """Reads a whole shard and holds it against the manifest.

    Args:
        location: The data set's folder.
        info: The shard's entry in the manifest.

    Raises:
        WorldError: Missing, truncated, altered or miscounted; names the shard, what was expected and what was found.
    """
    path = storage.join(location, info.name)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise WorldError(f"shard {path} is missing: the manifest expects {info.num_bytes} bytes") from error
    except OSError as error:
        raise WorldError(f"cannot read shard {path}: {error}") from error
    if len(data) != info.num_bytes:
        raise WorldError(f"shard {path} has a wrong length: expected {info.num_bytes} bytes, found {len(data)}")
    found = storage.sha256_hex(data)
    if found != info.sha256:
        raise WorldError(f"shard {path} was altered: expected sha256 {info.sha256}, found {found}")
    samples = parse_shard(path, data)
    if len(samples) != info.num_images:
        raise WorldError(f"shard {path} is miscounted: expected {info.num_images} images, found {len(samples)}")
    return samples


def load_manifest(location: str) -> Manifest:
    """Reads a data set's manifest.

    Raises:
        UserError: No manifest (says whether a half-written data set lies there), or one that cannot be read.
        WorldError: Storage refused or did not answer.
    """
    path = storage.join(location, MANIFEST_NAME)
    try:
        text = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(_no_manifest(location)) from error
    except OSError as error:
        raise WorldError(f"cannot read {path}: {error}") from error
    try:
        return Manifest.from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _no_manifest(location: str) -> str:
    again = "run jobs/prepare_data.py"
    if any(file.endswith(".tar") for file in storage.list_files(location)):
        return f"{location} holds a half-written data set: shards but no {MANIFEST_NAME}; {again} again to finish it"
    return f"{location} holds no data set: there is no {MANIFEST_NAME}; {again} first, or give another data set"


def _encoded_sample(group: dict[str, Any]) -> EncodedSample:
    label = group.get("cls")
    return EncodedSample(str(group["__key__"]), group[IMAGE_FORMAT], None if label is None else int(label))


def _parse_manifest(record: dict[str, Any]) -> Manifest:
    version = record["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"format version {version!r} is not supported, only {FORMAT_VERSION}; prepare the data again")
    fields = {
        **record,
        "class_names": tuple(record["class_names"]),
        "shards": tuple(ShardInfo(**shard) for shard in record["shards"]),
    }
    manifest = Manifest(**fields)
    found = sum(manifest.shard_sizes)
    if manifest.num_images != found or min(manifest.shard_sizes, default=0) < 1:
        raise UserError(f"num_images is {manifest.num_images} but its shards hold {found}; prepare the data again")
    if manifest.image_format != IMAGE_FORMAT:
        raise UserError(f"image format {manifest.image_format!r} is not supported, only {IMAGE_FORMAT!r}")
    return manifest
