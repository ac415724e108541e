"""Existing WebDataset shards become a data set where they are: only indexes and a manifest are written."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import PrepareConfig
from pipeline.data.manifest import FORMAT_VERSION, Manifest, index_name
from pipeline.data.prepare import Finished, PrepareResult, claim, finished_shard, write_manifest
from pipeline.data.shards import index_shard
from pipeline.data.tasks import run_tasks
from pipeline.errors import UserError, WorldError

__all__ = ["index_existing"]


def index_existing(
    pattern: str,
    config: PrepareConfig,
    destination: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    use_ray: bool = False,
) -> PrepareResult:
    """Indexes shards that match a pattern, or continues.

    The labels are the members ``cls`` (or ``label`` in ``json``); a data set in which some images lack one has no
    classes. Images that all have one square shape are read as they are. Others are fitted to ``config.image_size``
    whenever they are read, which costs more than storing them in their size once.

    Args:
        pattern: Paths or ``s3://`` URIs with ``{00000..00099}`` and ``*``.
        config: Size, channels and crop.
        destination: Folder of the indexes and the manifest.
        on_progress: Called after each shard with (shards done, shards in all).
        use_ray: Index in Ray tasks instead of in this process.

    Raises:
        UserError: No shard matches, one is missing, the images differ in shape and no size is given, or the destination
            holds another data set.
        WorldError: A shard is damaged, or storage failed.
    """
    started = time.monotonic()
    absolute = pattern if storage.is_remote(pattern) else str(Path(pattern).expanduser().absolute())
    shards = storage.expand(absolute)
    if not shards:
        raise UserError(f"webdataset:{pattern} matches no file; give a pattern such as FOLDER/{{00000..00099}}.tar")
    source = f"webdataset:{absolute}"
    begun = _identity(FORMAT_VERSION, source, [(shard, _size(shard)) for shard in shards])
    # Size and crop matter to readers alone: given anew, they leave the indexes as they are.
    fingerprint = _identity(begun, config.image_size, config.image_channels, config.crop)
    manifest, num_written = claim(destination, source, fingerprint, begun=begun), 0
    if manifest is None:
        finished = []
        pieces = enumerate(shards)
        for shard in run_tasks(_index, destination, pieces, use_ray=use_ray):
            finished.append(shard)
            if on_progress is not None:
                on_progress(len(finished), len(shards))
        num_written = sum(shard.written for shard in finished)
        manifest = _finish(source, fingerprint, destination, finished, config)
    return PrepareResult(
        location=destination,
        manifest=manifest,
        num_written=num_written,
        num_skipped=len(manifest.shards) - num_written,
        seconds=time.monotonic() - started,
    )


def _identity(*facts: Any) -> str:
    return storage.sha256_hex(json.dumps(facts).encode())


def _size(shard: str) -> int:
    try:
        return storage.num_bytes(shard)
    except FileNotFoundError:
        raise UserError(f"shard {shard} does not exist; give a pattern that names existing shards") from None


def _index(destination: str, number: int, shard: str) -> Finished:
    """Indexes one shard, unless that is done. Runs in this process or as a Ray task."""
    index = finished_shard(destination, number, shard)
    if index is not None:
        return Finished(number, shard, index, written=False)
    try:
        with storage.open_binary(shard) as file:
            index = index_shard(shard, file)
    except OSError as error:
        raise WorldError(f"cannot read shard {shard}: {error}; every node must see it") from error
    storage.write_bytes(storage.join(destination, index_name(number)), index.to_json())
    return Finished(number, shard, index, written=True)


def _finish(
    source: str, fingerprint: str, destination: str, finished: list[Finished], config: PrepareConfig
) -> Manifest:
    images = sum(len(shard.index.keys) for shard in finished)
    if not images:
        raise UserError(f"{source}: no png, jpg, jpeg or webp image in {len(finished)} shards")
    # What cannot be read is a fault of the data, met when it is read or by --verify.
    kinds = {kind for shard in finished for kind in shard.index.kinds if kind[0] != "unreadable"}
    if not kinds:
        raise UserError(f"{source}: none of its {images} images can be read")
    size, channels, is_exact = _shape(source, {kind[1:] for kind in kinds}, config)
    formats = {kind[0] for kind in kinds}
    labels = [shard.index.labels for shard in finished if len(shard.index.labels)]
    labelled = all(int(each.min()) >= 0 for each in labels)
    return write_manifest(
        destination,
        finished,
        source=source,
        source_fingerprint=fingerprint,
        image_size=size,
        image_channels=channels,
        class_names=tuple(str(c) for c in range(max(int(each.max()) for each in labels) + 1)) if labelled else (),
        image_format=formats.pop() if len(formats) == 1 else "mixed",
        fit=None if is_exact else config.crop,
    )


def _shape(source: str, shapes: set[tuple[int, int, int]], config: PrepareConfig) -> tuple[int, int, bool]:
    """Side, channels, and whether all images have them already."""
    height, width, channels = next(iter(shapes))
    uniform = len(shapes) == 1 and height == width and channels in (1, 3)
    if config.image_size is None and not uniform:
        some = ", ".join(f"{h}x{w}x{c}" for h, w, c in sorted(shapes)[:4])
        raise UserError(f"{source}: images have other shapes than one square ({some}); give --image-size to fit them")
    size = config.image_size or height
    wanted = config.image_channels or (channels if uniform else 3)
    return size, wanted, shapes == {(size, size, wanted)}
