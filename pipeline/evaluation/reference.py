"""Feature statistics of a data set, computed once and kept: by data digest and feature network."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.errors import WorldError
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.statistics import FeatureStatistics

__all__ = ["ShardFeatures", "reference_statistics"]

logger = logging.getLogger(__name__)


class ShardFeatures(Protocol):
    """What computes features of a data set: actors of an evaluation, or one process."""

    def shards(self, location: str, manifest: Manifest) -> Iterator[Tensor]:
        """Features of a data set's images, float32 [n, d], shard by shard."""
        ...


def reference_statistics(
    location: str, manifest: Manifest, extractor: FeatureExtractor, workers: ShardFeatures
) -> FeatureStatistics:
    """Statistics of all images of a data set.

    Raises:
        WorldError: A shard is missing or damaged.
    """
    cached = storage.join(storage.home(), "cache", "reference", f"{_key(manifest, extractor)}.safetensors")
    if storage.exists(cached):
        try:
            statistics = FeatureStatistics.from_bytes(storage.read_bytes(cached))
            if (statistics.n, statistics.dim) == (manifest.num_images, extractor.dim):
                return statistics
        except WorldError as error:
            logger.warning("%s is damaged and computed anew: %s", cached, error)
    logger.info("computing %s features of the %d reference images", extractor.name, manifest.num_images)
    statistics = FeatureStatistics.empty(extractor.dim)
    for features in workers.shards(location, manifest):
        statistics.update(features)
    storage.write_bytes(cached, statistics.to_bytes())
    return statistics


def _key(manifest: Manifest, extractor: FeatureExtractor) -> str:
    words = "\n".join([manifest.digest, extractor.name, extractor.sha256, extractor.resize])
    return hashlib.sha256(words.encode()).hexdigest()[:32]
