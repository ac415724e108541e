"""Prepare: images of a source become shards with their indexes, and last the manifest that makes them a data set.

The work continues after a kill. ``source.json`` is written first and says what the folder is made from; every file
appears whole or not at all; a shard's index is written after the shard, so a shard that has an index is finished;
``manifest.json`` is written last.
"""

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.config import PrepareConfig
from pipeline.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    ShardIndex,
    index_name,
    load_manifest,
    shard_location,
    shard_name,
)
from pipeline.data.shards import encode_shard, index_shard
from pipeline.data.sources import Source
from pipeline.data.tasks import run_tasks
from pipeline.errors import UserError, WorldError
from pipeline.images import encode_image

__all__ = ["SOURCE_RECORD_NAME", "Finished", "PrepareResult", "claim", "finished_shard", "prepare", "write_manifest"]

SOURCE_RECORD_NAME = "source.json"
_SAMPLE_IMAGES = 256
_TAR_BYTES = 2048  # headers and padding of an image and its label


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What a call did.

    Attributes:
        location: The data set's folder.
        manifest: The manifest that lies there now.
        num_written: Shards written (or indexed) by this call; 0 when the data set was already whole.
        num_skipped: Shards that an earlier call had finished.
        seconds: Duration of the call.
    """

    location: str
    manifest: Manifest
    num_written: int
    num_skipped: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Finished:
    """A shard that lies in its place with its index, and whether this call made it."""

    number: int
    name: str
    index: ShardIndex
    written: bool


Progress = Callable[[int, int], None]


def prepare(
    source: Source,
    config: PrepareConfig,
    destination: str,
    *,
    on_progress: Progress | None = None,
    use_ray: bool = False,
) -> PrepareResult:
    """Makes a data set, or finishes one that an earlier call with the same arguments began.

    Args:
        source: The images.
        config: How they are stored.
        destination: The data set's folder: an absolute path or an ``s3://`` URI. With Ray on several nodes, one that
            all nodes share.
        on_progress: Called after each shard with (images done, images in all).
        use_ray: Encode in Ray tasks (Ray must be initialised) instead of in this process.

    Raises:
        UserError: A file is no image, or the destination holds another data set.
        WorldError: Storage failed, or the nodes do not share the folder.
    """
    started = time.monotonic()
    if not len(source):
        raise UserError(f"{source.name} holds no images; give a source with images")
    if config.image_format == "webp" and source.image_channels == 1:
        raise UserError("--image-format webp: WebP has no grey images; give png or jpeg, or --image-channels 3")
    fingerprint = _fingerprint(source, config)
    manifest = claim(destination, source.name, fingerprint)
    num_written = 0
    if manifest is None:
        finished = _make_all(source, config, destination, on_progress, use_ray)
        num_written = sum(shard.written for shard in finished)
        manifest = write_manifest(
            destination,
            finished,
            source=source.name,
            source_fingerprint=fingerprint,
            image_size=source.image_size,
            image_channels=source.image_channels,
            class_names=source.class_names,
            image_format=config.image_format,
        )
    return PrepareResult(
        location=destination,
        manifest=manifest,
        num_written=num_written,
        num_skipped=len(manifest.shards) - num_written,
        seconds=time.monotonic() - started,
    )


def claim(destination: str, source: str, fingerprint: str, *, begun: str | None = None) -> Manifest | None:
    """The finished data set if it is ours; else None, after marking the folder as ours. Never mixes two data sets.

    Args:
        destination: The data set's folder.
        source: The source in words.
        fingerprint: Identity of the whole data set.
        begun: Identity of what is written before the manifest, if fewer options matter to that.

    Raises:
        UserError: The folder holds another data set, the beginning of one, or shards of unknown origin.
    """
    other = "choose another --data or delete it"
    if storage.exists(storage.join(destination, MANIFEST_NAME)):
        manifest = load_manifest(destination)
        if manifest.source_fingerprint != fingerprint:
            what = f"{manifest.num_images} images of {manifest.source} or with other options"
            raise UserError(f"{destination} holds another data set ({what}); {other}")
        return manifest
    begun = begun or fingerprint
    path = storage.join(destination, SOURCE_RECORD_NAME)
    if storage.exists(path):
        record = _read_record(path)
        if record.get("source_fingerprint") != begun:
            began = f"from {record.get('source')}, other files or options"
            raise UserError(f"{destination} holds the beginning of another data set ({began}); {other}")
        return None
    if any(file.endswith(".tar") for file in storage.list_files(destination)):
        raise UserError(f"{destination} holds shards of unknown origin (no {SOURCE_RECORD_NAME}); {other}")
    record = {"source": source, "source_fingerprint": begun}
    storage.write_bytes(path, (json.dumps(record, indent=2) + "\n").encode())
    return None


def finished_shard(destination: str, number: int, name: str) -> ShardIndex | None:
    """The index of a shard that an earlier call has finished; None if there is no whole index or no such shard."""
    try:
        index = ShardIndex.from_json(storage.read_bytes(storage.join(destination, index_name(number))))
        found = storage.num_bytes(shard_location(destination, name))
    except (FileNotFoundError, ValueError):
        return None
    return index if found == index.num_bytes else None


def write_manifest(destination: str, finished: Sequence[Finished], **facts: Any) -> Manifest:
    """Makes the shards a data set.

    Args:
        destination: The data set's folder.
        finished: Its shards, in any order; those without images are left out.
        facts: The manifest's other fields.

    Raises:
        WorldError: A shard that another node wrote is not to be seen here.
    """
    shards = sorted((shard for shard in finished if shard.index.keys), key=lambda shard: shard.number)
    for shard in shards:
        path = shard_location(destination, shard.name)
        if not storage.is_remote(path) and not Path(path).is_file():
            where = f"{shard.name} was written on another node and is not in {destination} here"
            raise WorldError(f"{where}; give an s3:// URI or a folder that all nodes share")
    heads = np.concatenate([shard.index.sha256_heads for shard in shards])
    manifest = Manifest(
        largest_image_bytes=max(int(shard.index.sizes.max()) for shard in shards),
        num_duplicates=len(heads) - len(np.unique(heads)),
        num_images=len(heads),
        shards=tuple(shard.index.describe(shard.name, index_name(shard.number)) for shard in shards),
        **facts,
    )
    storage.write_bytes(storage.join(destination, MANIFEST_NAME), manifest.to_json().encode())
    return manifest


def _fingerprint(source: Source, config: PrepareConfig) -> str:
    identity = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "inventory": source.inventory(),
        "image_size": source.image_size,
        "image_channels": source.image_channels,
        "crop": config.crop,
        "image_format": config.image_format,
        "image_quality": None if config.image_format == "png" else config.image_quality,
        "images_per_shard": config.shard_bytes is None and config.images_per_shard,
        "shard_bytes": config.shard_bytes,
    }
    return storage.sha256_hex(json.dumps(identity, sort_keys=True).encode())


def _read_record(path: str) -> dict[str, str]:
    try:
        return dict(json.loads(storage.read_bytes(path)))
    except (ValueError, TypeError):
        return {}


def _make_all(
    source: Source, config: PrepareConfig, destination: str, on_progress: Progress | None, use_ray: bool
) -> list[Finished]:
    per_shard = _images_per_shard(source, config)
    finished, num_done = [], 0
    pieces = _pieces(source, destination, per_shard)
    for shard in run_tasks(_make_shard, (source, config, destination), pieces, use_ray=use_ray):
        finished.append(shard)
        num_done += len(shard.index.keys)
        if on_progress is not None:
            on_progress(num_done, len(source))
    return finished


def _images_per_shard(source: Source, config: PrepareConfig) -> int:
    """From ``--shard-bytes`` and a sample that is the same at every call, so that a killed preparation continues."""
    if config.shard_bytes is None:
        return config.images_per_shard
    step = 1 if source.reads_in_driver else max(1, len(source) // _SAMPLE_IMAGES)
    sizes = []
    for index in range(0, len(source), step)[:_SAMPLE_IMAGES]:
        for sample in source.samples(index, source.read(index, index + 1)):
            sizes.append(len(encode_image(sample.pixels, config.image_format, config.image_quality)) + _TAR_BYTES)
    return max(1, int(config.shard_bytes * len(sizes) / sum(sizes)))


def _pieces(source: Source, destination: str, per_shard: int) -> Iterator[tuple[int, int, int, list[Any] | None]]:
    """(number, first image, one past the last, items read here or None), for shards that may still have to be made."""
    for number, start in enumerate(range(0, len(source), per_shard)):
        stop = min(start + per_shard, len(source))
        items = None
        if source.reads_in_driver and finished_shard(destination, number, shard_name(number)) is None:
            items = source.read(start, stop)
        yield number, start, stop, items


def _make_shard(
    shared: tuple[Source, PrepareConfig, str], number: int, start: int, stop: int, items: list[Any] | None
) -> Finished:
    """Writes one shard and its index, unless they are there. Runs in this process or as a Ray task."""
    source, config, destination = shared
    name = shard_name(number)
    found = finished_shard(destination, number, name)
    if found is not None and len(found.keys) == stop - start:
        return Finished(number, name, found, written=False)
    samples = source.samples(start, source.read(start, stop) if items is None else items)
    data = encode_shard(samples, config.image_format, config.image_quality)
    index = index_shard(name, io.BytesIO(data))
    storage.write_bytes(storage.join(destination, name), data)
    storage.write_bytes(storage.join(destination, index_name(number)), index.to_json())
    return Finished(number, name, index, written=True)
