"""The prepare job: where the data set goes, whether Ray is worth starting, and progress for a person."""

import logging
import time
from collections.abc import Callable

from pipeline import cluster, storage
from pipeline.config import PrepareConfig
from pipeline.data.prepare import PrepareResult, prepare

__all__ = ["prepare_data"]

logger = logging.getLogger(__name__)

_LINE_SECONDS = 5.0


def prepare_data(config: PrepareConfig) -> PrepareResult:
    """Prepares the data set that ``config`` describes. Raises as ``prepare``."""
    destination = storage.resolve(config.data or _default_name(config.source), "data")

    def run(use_ray: bool) -> PrepareResult:
        return prepare(
            config.source,
            destination,
            image_size=config.image_size,
            image_channels=config.image_channels,
            images_per_shard=config.images_per_shard,
            on_progress=_progress(),
            use_ray=use_ray,
        )

    if config.source == "digits":
        return run(use_ray=False)  # done sooner than Ray starts
    with cluster.connect(num_cpus=1):
        return run(use_ray=True)


def _default_name(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def _progress() -> Callable[[int, int], None]:
    started = time.monotonic()
    next_line = started + _LINE_SECONDS

    def show(done: int, total: int) -> None:
        nonlocal next_line
        now = time.monotonic()
        if now < next_line:
            return
        next_line = now + _LINE_SECONDS
        rate = done / (now - started)
        logger.info("%d/%d images, %.0f images/s, about %.0f s left", done, total, rate, (total - done) / rate)

    return show
