"""What a data set is: a folder of shards, an index for each of them, and ``manifest.json``, which is written last.

The manifest lists the shards with their counts, so that the place of every image in every epoch is known before any
shard is opened. The index of a shard says where in the tar file each image lies, and its checksum: readers go straight
to the bytes and never parse a tar file. Shards lie in the folder or, when they were indexed where they are, anywhere.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.errors import UserError, WorldError

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "Fit", "Manifest", "ShardIndex", "ShardInfo"]
__all__ += ["index_name", "load_manifest", "shard_location", "shard_name"]

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
Fit = Literal["center", "pad", "stretch"]
"""How an image of another shape becomes a square: cut to the centre, framed in white, or distorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What the manifest knows of a shard."""

    name: str
    """File name in the data set's folder; an absolute location when the shard lies elsewhere."""
    index: str
    """File name of its index in the data set's folder."""
    num_images: int
    num_bytes: int
    sha256: str
    index_sha256: str
    """Checksum of the index file."""


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
        image_format: File format of the images: png, jpeg or webp; "mixed" in shards of others.
        fit: None: the stored images have the size and channels above. Else they have any shape and are fitted when
            read, in this way.
        largest_image_bytes: Size of the largest image file.
        num_duplicates: Images whose bytes equal those of an earlier image.
        num_images: Images in all shards.
        shards: All shards, in order.
    """

    format_version: int = FORMAT_VERSION
    source: str
    source_fingerprint: str
    image_size: int
    image_channels: int
    class_names: tuple[str, ...]
    image_format: str = "png"
    fit: Fit | None = None
    largest_image_bytes: int
    num_duplicates: int = 0
    num_images: int
    shards: tuple[ShardInfo, ...]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Number of images in each shard."""
        return tuple(shard.num_images for shard in self.shards)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of an image as it is read."""
        return self.image_size, self.image_size, self.image_channels

    @property
    def digest(self) -> str:
        """Identity of the content: sha256 over what a model trained on it could notice, not over where it came from."""
        content = {
            "image_size": self.image_size,
            "image_channels": self.image_channels,
            "class_names": self.class_names,
            "fit": self.fit,
            # Labels, and which members of a tar file count as images, are in the index.
            "shards": [(shard.sha256, shard.index_sha256) for shard in self.shards],
        }
        return storage.sha256_hex(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

    def to_json(self) -> str:
        """The record as JSON, one line a shard."""
        record = asdict(self)
        shards = ",\n".join("    " + json.dumps(shard) for shard in record.pop("shards"))
        head = json.dumps(record, indent=2).removesuffix("\n}")
        return f'{head},\n  "shards": [\n{shards}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Parses ``to_json``.

        Raises:
            UserError: Not JSON, another format version, missing fields, or numbers that do not add up.
        """
        try:
            # Each shard becomes its small record at once: a dictionary for every shard takes five times the memory.
            return _parse_manifest(json.loads(text, object_hook=_shard_or_record))
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"not a readable manifest ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardIndex:
    """Where the images of one shard lie, n of them, in the order of the tar file.

    Attributes:
        keys: Names of the samples: what members of a sample have in common, up to the first dot.
        offsets: Where each image file begins in the shard, int64 [n], bytes.
        sizes: Length of each image file, int64 [n], bytes.
        sha256_heads: First 8 bytes of each image file's sha256, big-endian, uint64 [n].
        labels: Class indices, int64 [n]; -1 for none.
        num_bytes: Length of the shard.
        sha256: Checksum of the shard.
        kinds: The different (format, height, width, channels) of the images; channels is 0 where they are neither grey
            nor RGB.
    """

    keys: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    sha256_heads: np.ndarray
    labels: np.ndarray
    num_bytes: int
    sha256: str
    kinds: tuple[tuple[str, int, int, int], ...]

    def to_json(self) -> bytes:
        """The index as JSON, a line for each column."""
        columns = {
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "kinds": self.kinds,
            "keys": self.keys,
            "offsets": self.offsets.tolist(),
            "sizes": self.sizes.tolist(),
            "sha256_heads": [f"{head:016x}" for head in self.sha256_heads.tolist()],
            "labels": self.labels.tolist(),
        }
        lines = ",\n".join(f'"{name}": {json.dumps(column, separators=(",", ":"))}' for name, column in columns.items())
        return f"{{\n{lines}\n}}\n".encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ShardIndex":
        """The inverse of ``to_json``.

        Raises:
            ValueError: Not an index.
        """
        try:
            record = json.loads(data)
            columns = {name: np.array(record[name], dtype=np.int64) for name in ("offsets", "sizes", "labels")}
            index = cls(
                keys=tuple(record["keys"]),
                sha256_heads=np.array([int(head, 16) for head in record["sha256_heads"]], dtype=np.uint64),
                num_bytes=record["num_bytes"],
                sha256=record["sha256"],
                kinds=tuple((form, height, width, channels) for form, height, width, channels in record["kinds"]),
                **columns,
            )
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"not a shard index ({type(error).__name__}: {error})") from error
        lengths = {len(index.keys), len(index.offsets), len(index.sizes), len(index.sha256_heads), len(index.labels)}
        if len(lengths) != 1:
            raise ValueError("not a shard index (its columns differ in length)")
        return index

    def describe(self, name: str, index: str) -> ShardInfo:
        """The shard's entry in the manifest."""
        return ShardInfo(
            name=name,
            index=index,
            num_images=len(self.keys),
            num_bytes=self.num_bytes,
            sha256=self.sha256,
            index_sha256=storage.sha256_hex(self.to_json()),
        )


def shard_name(number: int) -> str:
    """File name of shard ``number``."""
    return f"shard-{number:06d}.tar"


def index_name(number: int) -> str:
    """File name of the index of shard ``number``; it lies in the data set's folder wherever the shard lies."""
    return f"index/{number:06d}.json"


def shard_location(location: str, name: str) -> str:
    """Where a shard of the data set at ``location`` lies."""
    return name if name.startswith("/") or storage.is_remote(name) else storage.join(location, name)


def load_manifest(location: str) -> Manifest:
    """Reads a data set's manifest.

    Raises:
        UserError: No manifest (says whether a half-written data set lies there), or one that cannot be read.
        WorldError: Storage refused or did not answer.
    """
    path = storage.join(location, MANIFEST_NAME)
    try:
        # Only the text stays: of 100,000 shards it is 25 MiB, and its bytes are as many.
        text = storage.read_bytes(path).decode(errors="replace")
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


def _shard_or_record(record: dict[str, Any]) -> Any:
    return ShardInfo(**record) if "index_sha256" in record else record


def _parse_manifest(record: dict[str, Any]) -> Manifest:
    version = record["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"format version {version!r} is not supported, only {FORMAT_VERSION}; prepare the data again")
    manifest = Manifest(**record | {name: tuple(record[name]) for name in ("class_names", "shards")})
    if not all(isinstance(shard, ShardInfo) for shard in manifest.shards):
        raise UserError("not a readable manifest (a shard's entry is incomplete)")
    found = sum(manifest.shard_sizes)
    if manifest.num_images != found or min(manifest.shard_sizes, default=0) < 1:
        raise UserError(f"num_images is {manifest.num_images} but its shards hold {found}; prepare the data again")
    return manifest
