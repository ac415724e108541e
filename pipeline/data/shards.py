"""Shards: WebDataset tar files of images. Writing them, indexing them, reading one whole.

Stock WebDataset reads our shards and we read shards that others wrote. Nothing in a shard is ever unpickled, and the
names of its members are never used as paths.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from pipeline import storage
from pipeline.data.faults import DataError
from pipeline.data.manifest import Manifest, ShardIndex, shard_location
from pipeline.data.sources import Sample, fit_image
from pipeline.errors import UserError, WorldError
from pipeline.images import decode_into, encode_image

__all__ = ["decode_sample", "encode_shard", "index_shard", "read_chosen", "read_images", "read_index", "sha256_head"]

_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_CHUNK_BYTES = 8 * 2**20
_MAX_LABELS = 1_000_000  # each gets a name in the manifest


def encode_shard(samples: Iterable[Sample], image_format: str = "png", quality: int = 95) -> bytes:
    """Packs samples into a WebDataset tar: ``KEY.png`` and, with a label, ``KEY.cls``. Same samples, same bytes."""
    buffer = io.BytesIO()
    extension = "jpg" if image_format == "jpeg" else image_format
    # The default mtime is the clock: it would change the bytes at every run and add a pax header to every member.
    options: dict[str, Any] = {"mtime": 0, "user": "ddpm", "group": "ddpm", "mode": 0o444, "encoder": False}
    with webdataset.TarWriter(buffer, **options) as writer:
        for sample in samples:
            members: dict[str, Any] = {
                "__key__": sample.key,
                extension: encode_image(sample.pixels, image_format, quality),
            }
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            writer.write(members)
    return buffer.getvalue()


def index_shard(location: str, file: BinaryIO) -> ShardIndex:
    """Finds the images in a WebDataset tar file, in the order written; decodes none.

    A sample is a run of members with one key, the name up to the first dot after the folders. Its image is the member
    png, jpg, jpeg or webp; its label the member cls, or the integer ``label`` (or ``cls``) of the member json. A sample
    without an image is left out, as img2dataset leaves one behind for every download that failed.

    Args:
        location: The shard's location, for messages.
        file: Its bytes, seekable.

    Raises:
        UserError: Two images of one key, or a label that is no whole number.
        WorldError: Not a tar file, or one that is cut off.
    """
    digest, num_bytes = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        num_bytes += len(chunk)
    file.seek(0)
    rows: list[tuple[str, int, int, int, int]] = []
    seen: set[str] = set()
    kinds: set[tuple[str, int, int, int]] = set()
    try:
        # "r:" and not "r": a compressed shard has no offsets to go to, and may be a bomb.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in _samples(tar):
                image = next((members[extension] for extension in _EXTENSIONS if extension in members), None)
                if image is None:
                    continue
                if key in seen:
                    raise UserError(f"shard {location} has two images of key {key}; keys must be unique in a shard")
                seen.add(key)
                data = _content(tar, image)
                kinds.add(_kind(data))
                label = _label(location, key, members, tar)
                rows.append((key, image.offset_data, image.size, sha256_head(data), label))
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise WorldError(f"shard {location} is not a whole tar file: {error}") from error
    return ShardIndex(
        keys=tuple(row[0] for row in rows),
        offsets=np.array([row[1] for row in rows], dtype=np.int64),
        sizes=np.array([row[2] for row in rows], dtype=np.int64),
        sha256_heads=np.array([row[3] for row in rows], dtype=np.uint64),
        labels=np.array([row[4] for row in rows], dtype=np.int64),
        num_bytes=num_bytes,
        sha256=digest.hexdigest(),
        kinds=tuple(sorted(kinds)),
    )


def read_index(location: str, manifest: Manifest, number: int, *, patience_seconds: float = 0.0) -> ShardIndex:
    """Reads the index of shard ``number`` and holds it against the manifest.

    Raises:
        DataError: Missing or altered.
        WorldError: Storage refused or did not answer.
    """
    info = manifest.shards[number]
    path = storage.join(location, info.index)
    try:
        data = storage.read_bytes(path, patience_seconds=patience_seconds)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(info.name, f"its index {path} is missing") from error
    except OSError as error:
        raise WorldError(f"cannot read {path}: {error}") from error
    if storage.sha256_hex(data) != info.index_sha256:
        raise DataError(info.name, f"its index {path} was altered: the manifest expects sha256 {info.index_sha256}")
    index = ShardIndex.from_json(data)
    if len(index.keys) != info.num_images:
        raise DataError(info.name, f"its index lists {len(index.keys)} images, the manifest {info.num_images}")
    return index


def decode_sample(data: bytes, out: np.ndarray, manifest: Manifest) -> None:
    """Decodes an image file of the data set into ``out``, uint8 [H, W, C].

    Raises:
        ValueError: Damaged, or not of the manifest's shape.
    """
    if manifest.fit is None:
        decode_into(data, out)
    else:
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
                fitted = fit_image(picture, manifest.image_size, manifest.image_channels, manifest.fit)
        except Exception as error:  # Pillow's plug-ins raise anything on broken files, struct.error and IndexError too
            raise ValueError(f"not a readable image: {error}") from error
        out[...] = fitted.permute(1, 2, 0).numpy()


def read_images(location: str, manifest: Manifest, number: int) -> Tensor:
    """All images of a shard in its order, uint8 [n, C, H, W]; every byte is held against the manifest.

    Raises:
        DataError: Missing, truncated, altered or undecodable; names the shard, and key and offset of the image.
        WorldError: Storage refused or did not answer.
    """
    info = manifest.shards[number]
    index = read_index(location, manifest, number)
    data = read_shard(location, manifest, number)
    images = np.empty((info.num_images, *manifest.image_shape), dtype=np.uint8)
    rows = zip(index.keys, index.offsets.tolist(), index.sizes.tolist(), strict=True)
    for out, (key, offset, size) in zip(images, rows, strict=True):
        try:
            decode_sample(data[offset : offset + size], out, manifest)
        except ValueError as error:
            raise DataError(info.name, str(error), key=key, offset=offset) from error
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def read_chosen(location: str, manifest: Manifest, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images of a data set by their places in it, read one by one; each is held against the index.

    Args:
        location: The data set.
        manifest: Its manifest.
        places: Ascending, each in [0, manifest.num_images).

    Returns:
        Images, uint8 [n, C, H, W], and their labels, int64 [n], -1 for none.

    Raises:
        DataError: Missing, altered or undecodable; names the shard, and key and offset of the image.
        WorldError: Storage refused or did not answer.
    """
    images = np.empty((len(places), *manifest.image_shape), dtype=np.uint8)
    labels = np.full(len(places), -1, dtype=np.int64)
    ends = np.cumsum(manifest.shard_sizes)
    numbers = np.searchsorted(ends, places, side="right")
    for number in np.unique(numbers).tolist():
        index, info = read_index(location, manifest, number), manifest.shards[number]
        path = shard_location(location, info.name)
        for slot in np.flatnonzero(numbers == number).tolist():
            row = int(places[slot]) - int(ends[number]) + info.num_images
            offset, size = int(index.offsets[row]), int(index.sizes[row])
            try:
                data = storage.read_range(path, offset, size)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DataError(path, f"it is missing; the manifest expects {info.num_bytes} bytes") from error
            except OSError as error:
                raise WorldError(f"cannot read shard {path}: {error}") from error
            try:
                if sha256_head(data) != int(index.sha256_heads[row]):
                    raise ValueError("it was altered: its sha256 is not that of the index")
                decode_sample(data, images[slot], manifest)
            except ValueError as error:
                raise DataError(info.name, str(error), key=index.keys[row], offset=offset) from error
            labels[slot] = index.labels[row]
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def read_shard(location: str, manifest: Manifest, number: int) -> bytes:
    """A shard's bytes, held against the manifest.

    Raises:
        DataError: Missing, truncated or altered.
        WorldError: Storage refused or did not answer.
    """
    info = manifest.shards[number]
    path = shard_location(location, info.name)
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(path, f"it is missing; the manifest expects {info.num_bytes} bytes") from error
    except OSError as error:
        raise WorldError(f"cannot read shard {path}: {error}") from error
    if len(data) != info.num_bytes:
        raise DataError(path, f"wrong length: expected {info.num_bytes} bytes, found {len(data)}")
    found = storage.sha256_hex(data)
    if found != info.sha256:
        raise DataError(path, f"it was altered: expected sha256 {info.sha256}, found {found}")
    return data


def sha256_head(data: bytes) -> int:
    """The first 8 bytes of the sha256, big-endian: tells images apart and notices damage in 8 bytes an image."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Groups the members of a tar file into samples as WebDataset does."""
    key, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header for ever otherwise
        prefix, extension = webdataset.tariterators.base_plus_ext(member.name)
        if not member.isreg() or member.sparse is not None or prefix is None:
            continue
        if members and (prefix != key or extension.lower() in members):
            yield key, members
            members = {}
        key = prefix
        members[extension.lower()] = member
    if members:
        yield key, members


def _check_end(file: BinaryIO, offset: int) -> None:
    """tarfile takes a damaged header in the middle for the end of the file; the real end is a block of zeros."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise EOFError(f"it is cut off or damaged at byte {offset}")


def _kind(data: bytes) -> tuple[str, int, int, int]:
    """Format, height, width and channels, from the header alone."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            channels = {"L": 1, "RGB": 3}.get(picture.mode, 0)
            return str(picture.format).lower(), picture.height, picture.width, channels
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "unreadable", 0, 0, 0


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise EOFError(f"it ends inside {member.name}")
    return data


def _label(location: str, key: str, members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> int:
    try:
        label = None
        if "cls" in members:
            label = int(_content(tar, members["cls"]))
        elif "json" in members:
            record = json.loads(_content(tar, members["json"]))
            value = record.get("label", record.get("cls")) if isinstance(record, dict) else None
            label = value if isinstance(value, int) else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"shard {location}, sample {key}: its label is no whole number ({error})") from error
    if label is not None and not -1 <= label < _MAX_LABELS:
        raise UserError(f"shard {location}, sample {key}: its label {label} is not in 0..{_MAX_LABELS - 1}")
    return -1 if label is None else label
