"""Reads a whole data set again: every count, every checksum, every image."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.faults import DataError
from pipeline.data.manifest import Manifest, load_manifest, shard_location
from pipeline.data.shards import decode_sample, read_index, sha256_head
from pipeline.data.tasks import run_tasks

__all__ = ["VerifyResult", "verify"]

_CHUNK_BYTES = 8 * 2**20
_MAX_FAULTS = 100  # of a shard: enough to see what happened to it


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was found.

    Attributes:
        location: The data set's folder.
        manifest: Its manifest.
        num_bad_images: Images that cannot be used.
        faults: What is wrong, a line each, in order of the shards; at most 100 a shard.
    """

    location: str
    manifest: Manifest
    num_bad_images: int
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return {
            "location": self.location,
            "digest": self.manifest.digest,
            "num_images": self.manifest.num_images,
            "num_shards": len(self.manifest.shards),
            "num_duplicates": self.manifest.num_duplicates,
            "num_bad_images": self.num_bad_images,
        }

    def text(self) -> str:
        """One line."""
        images, shards = self.manifest.num_images, len(self.manifest.shards)
        return (
            f"{self.location} is whole: {images:,} images in {shards} shards, every checksum right, every image decoded"
        )


def verify(
    location: str, *, on_progress: Callable[[int, int], None] | None = None, use_ray: bool = False
) -> VerifyResult:
    """Checks a data set; changes nothing.

    Args:
        location: The data set's folder.
        on_progress: Called after each shard with (images done, images in all).
        use_ray: Read in Ray tasks (Ray must be initialised) instead of in this process.

    Raises:
        UserError: There is no data set.
        WorldError: Storage refused or did not answer.
    """
    manifest = load_manifest(location)
    reports, num_done = [], 0
    pieces = ((number,) for number in range(len(manifest.shards)))
    for report in run_tasks(_verify_shard, (location, manifest), pieces, use_ray=use_ray):
        reports.append(report)
        num_done += manifest.shards[report[0]].num_images
        if on_progress is not None:
            on_progress(num_done, manifest.num_images)
    reports.sort()
    return VerifyResult(
        location=location,
        manifest=manifest,
        num_bad_images=sum(num_bad for _, num_bad, _ in reports),
        faults=tuple(fault for _, _, faults in reports for fault in faults),
    )


def _verify_shard(shared: tuple[str, Manifest], number: int) -> tuple[int, int, list[str]]:
    """(shard, images that cannot be used, what is wrong)."""
    location, manifest = shared
    info = manifest.shards[number]
    path = shard_location(location, info.name)
    faults: list[str] = []
    try:
        index = read_index(location, manifest, number)
        digest, num_bytes = hashlib.sha256(), 0
        for chunk in storage.read_chunks(path, chunk_bytes=_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    except (FileNotFoundError, NotADirectoryError):
        return number, info.num_images, [str(DataError(path, "it is missing"))]
    except DataError as fault:
        return number, info.num_images, [str(fault)]
    if num_bytes != info.num_bytes:
        faults.append(str(DataError(path, f"wrong length: expected {info.num_bytes} bytes, found {num_bytes}")))
    elif digest.hexdigest() != info.sha256:
        faults.append(str(DataError(path, f"altered: expected sha256 {info.sha256}, found {digest.hexdigest()}")))
    num_bad = 0
    out = np.empty(manifest.image_shape, dtype=np.uint8)
    with storage.open_binary(path) as file:
        for image, key in enumerate(index.keys):
            offset, size = int(index.offsets[image]), int(index.sizes[image])
            file.seek(offset)
            reason = _reason(file.read(size), size, int(index.sha256_heads[image]), out, manifest)
            if reason:
                num_bad += 1
                faults.append(str(DataError(path, reason, key=key, offset=offset)))
    return number, num_bad, faults[:_MAX_FAULTS]


def _reason(data: bytes, size: int, head: int, out: np.ndarray, manifest: Manifest) -> str:
    """Why an image cannot be used; empty when it can."""
    if len(data) != size:
        return f"the shard is cut off: {size} bytes expected there, {len(data)} found"
    if sha256_head(data) != head:
        return "its bytes were altered: wrong sha256"
    try:
        decode_sample(data, out, manifest)
    except ValueError as error:
        return str(error)
    return ""
