"""The prepare job: what is to be made and where, whether Ray is worth starting, and progress for a person."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import cluster, storage
from pipeline.config import PrepareConfig
from pipeline.data.holdout import split
from pipeline.data.indexing import index_existing
from pipeline.data.prepare import PrepareResult, prepare
from pipeline.data.sources import open_source
from pipeline.data.verify import VerifyResult, verify
from pipeline.errors import UserError, WorldError

__all__ = ["Outcome", "prepare_data"]

logger = logging.getLogger(__name__)

_LINE_SECONDS = 5.0
_SHOWN_FAULTS = 20
_WEBDATASET = "webdataset:"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the job did."""

    results: tuple[PrepareResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``: the data set, and the one held out from it."""
        facts = [_facts(result) for result in self.results]
        return facts[0] | ({"holdout": facts[1]} if len(facts) > 1 else {})

    def text(self) -> str:
        """A line for each data set."""
        return "\n".join(_text(result) for result in self.results)


def prepare_data(config: PrepareConfig) -> Outcome | VerifyResult:
    """Prepares, indexes or verifies the data set that ``config`` describes.

    Raises:
        UserError: As ``open_source``, ``prepare`` and ``index_existing``; options that do not go together.
        WorldError: Storage failed; or verifying found damage.
    """
    destination = storage.resolve(config.data or _default_name(config.source), "data")
    # The digits are done sooner than Ray starts.
    small = config.source == "digits" and not config.verify
    with contextlib.nullcontext() if small else cluster.connect(num_cpus=1):
        if config.verify:
            return _verify(destination)
        if config.source.startswith(_WEBDATASET):
            return Outcome(results=(_index(config, destination),))
        return Outcome(results=tuple(_prepare(config, destination, use_ray=not small)))


def _prepare(config: PrepareConfig, destination: str, *, use_ray: bool) -> Iterator[PrepareResult]:
    source = open_source(
        config.source, image_size=config.image_size, image_channels=config.image_channels, crop=config.crop
    )
    if not config.holdout_fraction:
        yield prepare(source, config, destination, on_progress=_progress("images"), use_ray=use_ray)
        return
    for part, suffix in zip(split(source, config.holdout_fraction), ("", "-holdout"), strict=True):
        yield prepare(part, config, destination + suffix, on_progress=_progress("images"), use_ray=use_ray)


def _index(config: PrepareConfig, destination: str) -> PrepareResult:
    if config.holdout_fraction or config.shard_bytes is not None:
        raise UserError(
            f"--source {config.source}: shards are indexed as they are; --holdout-fraction and --shard-bytes need a "
            "source that is rewritten"
        )
    pattern = config.source.removeprefix(_WEBDATASET)
    return index_existing(pattern, config, destination, on_progress=_progress("shards"), use_ray=True)


def _verify(location: str) -> VerifyResult:
    result = verify(location, on_progress=_progress("images"), use_ray=True)
    if not result.faults:
        return result
    for fault in result.faults[:_SHOWN_FAULTS]:
        logger.error("%s", fault)
    if len(result.faults) > _SHOWN_FAULTS:
        logger.error("... and %d more", len(result.faults) - _SHOWN_FAULTS)
    raise WorldError(
        f"{location} is damaged: {result.num_bad_images} of {result.manifest.num_images} images cannot be used; "
        "restore the shards named above, or delete the data set and prepare it again"
    )


def _default_name(source: str) -> str:
    name = source.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    if any(character in name for character in "*?[{"):
        raise UserError(f"--source {source}: a pattern gives no name; give --data NAME")
    return name.partition(".")[0] or name


def _facts(result: PrepareResult) -> dict[str, Any]:
    manifest = result.manifest
    return {
        "location": result.location,
        "digest": manifest.digest,
        "num_images": manifest.num_images,
        "num_shards": len(manifest.shards),
        "num_duplicates": manifest.num_duplicates,
        "shards_written": result.num_written,
        "seconds": round(result.seconds, 2),
    }


def _text(result: PrepareResult) -> str:
    manifest = result.manifest
    state = "is ready" if result.num_written else "was already there"
    twins = f"; {manifest.num_duplicates:,} are exact duplicates of others" if manifest.num_duplicates else ""
    return f"{result.location} {state}: {manifest.num_images:,} images in {len(manifest.shards)} shards{twins}"


def _progress(unit: str) -> Callable[[int, int], None]:
    started = time.monotonic()
    next_line = started + _LINE_SECONDS

    def show(done: int, total: int) -> None:
        nonlocal next_line
        now = time.monotonic()
        if now < next_line:
            return
        next_line = now + _LINE_SECONDS
        rate = done / (now - started)
        logger.info("%d/%d %s, %.1f %s/s, about %.0f s left", done, total, unit, rate, unit, (total - done) / rate)

    return show
