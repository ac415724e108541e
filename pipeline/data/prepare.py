"""Prepare: images of a source become shards, and last the manifest that makes them a data set.

The work continues after a kill. ``source.json`` is written first and says what the folder is made from; every shard
appears whole or not at all, so a shard that is there is finished; ``manifest.json`` is written last.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    encode_shard,
    load_manifest,
    parse_shard,
    shard_name,
)
from pipeline.data.sources import Source, open_source, sample_key
from pipeline.errors import UserError, WorldError

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["SOURCE_RECORD_NAME", "PrepareResult", "prepare"]

SOURCE_RECORD_NAME = "source.json"


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What a call of ``prepare`` did.

    Attributes:
        location: The data set's folder.
        manifest: The manifest that lies there now.
        num_written: Shards written by this call; 0 when the data set was already whole.
        num_skipped: Shards that an earlier call had finished.
        seconds: Duration of the call.
    """

    location: str
    manifest: Manifest
    num_written: int
    num_skipped: int
    seconds: float


def prepare(
    source_spec: str,
    destination: str,
    *,
    image_size: int | None = None,
    image_channels: int | None = None,
    images_per_shard: int = 1000,
    on_progress: Callable[[int, int], None] | None = None,
    use_ray: bool = False,
) -> PrepareResult:
    """Makes a data set, or finishes one that an earlier call with the same arguments began.

    Args:
        source_spec: What ``open_source`` takes.
        destination: The data set's folder: an absolute path or an ``s3://`` URI. With Ray on several nodes, one that
            all nodes share.
        image_size: Side of the images, in pixels; None keeps a source's native size.
        image_channels: 1 (grey) or 3 (RGB); None takes the source's default.
        images_per_shard: Images in every shard but the last.
        on_progress: Called after each shard with (images done, images in all).
        use_ray: Encode in Ray tasks (Ray must be initialised) instead of in this process.

    Raises:
        UserError: The source cannot be opened, a file is no image, or the destination holds another data set.
        WorldError: Storage failed, or the nodes do not share the folder.
    """
    started = time.monotonic()
    if images_per_shard < 1:
        raise UserError(f"--images-per-shard {images_per_shard}: give at least 1")
    source = open_source(source_spec, image_size=image_size, image_channels=image_channels)
    fingerprint = _fingerprint(source, images_per_shard)
    manifest, num_written = _claim(destination, source, fingerprint), 0
    if manifest is None:
        finished = _finish_all(source, _plan(source, destination, images_per_shard), on_progress, use_ray)
        num_written = sum(shard.written for shard in finished)
        manifest = _write_manifest(destination, source, fingerprint, tuple(shard.info for shard in finished))
    return PrepareResult(
        location=destination,
        manifest=manifest,
        num_written=num_written,
        num_skipped=len(manifest.shards) - num_written,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Job:
    """One shard to make: images ``start .. stop - 1`` of the source."""

    destination: str
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Finished:
    """A shard that lies in the destination, and whether this call wrote it."""

    info: ShardInfo
    written: bool


def _fingerprint(source: Source, images_per_shard: int) -> str:
    identity = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "inventory": source.inventory(),
        "image_size": source.image_size,
        "image_channels": source.image_channels,
        "images_per_shard": images_per_shard,
    }
    return storage.sha256_hex(json.dumps(identity, sort_keys=True).encode())


def _claim(destination: str, source: Source, fingerprint: str) -> Manifest | None:
    """The finished data set if it is ours; else None, after marking the folder as ours. Never mixes two data sets."""
    other = "choose another --data or delete it"
    if storage.exists(storage.join(destination, MANIFEST_NAME)):
        manifest = load_manifest(destination)
        if manifest.source_fingerprint != fingerprint:
            what = f"{manifest.num_images} images of {manifest.source} or with other options"
            raise UserError(f"{destination} holds another data set ({what}); {other}")
        return manifest
    path = storage.join(destination, SOURCE_RECORD_NAME)
    if storage.exists(path):
        record = _read_record(path)
        if record.get("source_fingerprint") != fingerprint:
            began = f"from {record.get('source')}, other files or options"
            raise UserError(f"{destination} holds the beginning of another data set ({began}); {other}")
        return None
    if any(file.endswith(".tar") for file in storage.list_files(destination)):
        raise UserError(f"{destination} holds shards of unknown origin (no {SOURCE_RECORD_NAME}); {other}")
    record = {"source": source.name, "source_fingerprint": fingerprint}
    storage.write_bytes(path, (json.dumps(record, indent=2) + "\n").encode())
    return None


def _read_record(path: str) -> dict[str, str]:
    try:
        return dict(json.loads(storage.read_bytes(path)))
    except (ValueError, TypeError):
        return {}


def _plan(source: Source, destination: str, images_per_shard: int) -> list[_Job]:
    starts = range(0, len(source), images_per_shard)
    return [
        _Job(destination, shard_name(number), start, min(start + images_per_shard, len(source)))
        for number, start in enumerate(starts)
    ]


def _finish_all(
    source: Source, jobs: list[_Job], on_progress: Callable[[int, int], None] | None, use_ray: bool
) -> list[_Finished]:
    finished, num_done = [], 0
    for shard in _finish_with_ray(source, jobs) if use_ray else (_finish_shard(source, job) for job in jobs):
        finished.append(shard)
        num_done += shard.info.num_images
        if on_progress is not None:
            on_progress(num_done, len(source))
    # Tasks end in any order; the manifest has the order of the source.
    return sorted(finished, key=lambda shard: shard.info.name)


def _finish_shard(source: Source, job: _Job) -> _Finished:
    """Writes one shard, unless it is there. Runs in this process or as a Ray task."""
    info = _find_finished(job)
    if info is not None:
        return _Finished(info, written=False)
    data = encode_shard(source.load(index) for index in range(job.start, job.stop))
    storage.write_bytes(storage.join(job.destination, job.name), data)
    return _Finished(ShardInfo.of(job.name, data, job.stop - job.start), written=True)


def _find_finished(job: _Job) -> ShardInfo | None:
    """Describes the shard that is there; None if there is none or it does not hold exactly the job's images.

    The shard is its own record: reading it is much cheaper than making it, and no second file can disagree with it.
    """
    try:
        data = storage.read_bytes(storage.join(job.destination, job.name))
    except FileNotFoundError:
        return None
    try:
        keys = [sample.key for sample in parse_shard(job.name, data)]
    except WorldError:
        return None
    expected = [sample_key(index) for index in range(job.start, job.stop)]
    return ShardInfo.of(job.name, data, len(keys)) if keys == expected else None


def _finish_with_ray(source: Source, jobs: list[_Job]) -> Iterator[_Finished]:
    import ray

    task = ray.remote(_finish_shard)
    # Once into the object store: a folder of a million files is a large list to send with every task.
    source_reference = ray.put(source)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    # Enough to keep every core busy, few enough that a failure is seen before thousands of tasks are queued.
    num_in_flight = 2 * max(1, int(resources.get("CPU", 1)))
    waiting = iter(jobs)
    running = [task.remote(source_reference, job) for job in islice(waiting, num_in_flight)]
    try:
        while running:
            (ready, *_), running = ray.wait(running, num_returns=1)
            yield _result(ready)
            running += [task.remote(source_reference, job) for job in islice(waiting, 1)]
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: "ObjectRef[_Finished]") -> _Finished:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Our own errors are one line that says what to do; Ray's wrapping would bury it in a remote traceback.
        if isinstance(error.cause, UserError | WorldError):
            raise error.cause from None
        raise


def _write_manifest(destination: str, source: Source, fingerprint: str, shards: tuple[ShardInfo, ...]) -> Manifest:
    if not storage.is_remote(destination):
        missing = [shard.name for shard in shards if not (Path(destination) / shard.name).is_file()]
        if missing:
            where = f"{missing[0]} was written on another node and is not in {destination} here"
            raise WorldError(f"{where}; give an s3:// URI or a folder that all nodes share")
    manifest = Manifest(
        source=source.name,
        source_fingerprint=fingerprint,
        image_size=source.image_size,
        image_channels=source.image_channels,
        class_names=source.class_names,
        num_images=len(source),
        shards=shards,
    )
    storage.write_bytes(storage.join(destination, MANIFEST_NAME), manifest.to_json().encode())
    return manifest
