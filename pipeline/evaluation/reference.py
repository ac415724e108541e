"""Feature statistics of a data set and a sample of its features, computed once and kept: by data digest and network."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.draws import Purpose, permutation
from pipeline.errors import WorldError
from pipeline.evaluation.feature_sample import MOST_FEATURES
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.statistics import FeatureStatistics

__all__ = ["ShardFeatures", "reference_sample", "reference_statistics"]

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
    found = _cached_statistics(manifest, extractor)
    return found if found is not None else _compute(location, manifest, extractor, workers, with_sample=False)[0]


def reference_sample(location: str, manifest: Manifest, extractor: FeatureExtractor, workers: ShardFeatures) -> Tensor:
    """Features of images of a data set in random order, always the same: all of them, or ``MOST_FEATURES``.

    Where the statistics are missing as well, both come from one pass over the data set.

    Returns:
        float32 [n, d].

    Raises:
        WorldError: A shard is missing or damaged.
    """
    cached = _location(manifest, extractor, sample=True)
    if storage.exists(cached):
        try:
            found = _decode_sample(storage.read_bytes(cached))
            if found.shape == (min(manifest.num_images, MOST_FEATURES), extractor.dim):
                return found
        except WorldError as error:
            logger.warning("%s is damaged and computed anew: %s", cached, error)
    return _compute(location, manifest, extractor, workers, with_sample=True)[1]


def _cached_statistics(manifest: Manifest, extractor: FeatureExtractor) -> FeatureStatistics | None:
    cached = _location(manifest, extractor)
    if not storage.exists(cached):
        return None
    try:
        statistics = FeatureStatistics.from_bytes(storage.read_bytes(cached))
        if (statistics.n, statistics.dim) == (manifest.num_images, extractor.dim):
            return statistics
    except WorldError as error:
        logger.warning("%s is damaged and computed anew: %s", cached, error)
    return None


def _compute(
    location: str, manifest: Manifest, extractor: FeatureExtractor, workers: ShardFeatures, *, with_sample: bool
) -> tuple[FeatureStatistics, Tensor]:
    """One pass over the data set; writes what was wanted, whole or not at all."""
    logger.info("computing %s features of the %d reference images", extractor.name, manifest.num_images)
    statistics = FeatureStatistics.empty(extractor.dim)
    count = min(manifest.num_images, MOST_FEATURES) if with_sample else 0
    place = torch.full((manifest.num_images,), -1)
    place[permutation(manifest.num_images, 0, Purpose.REFERENCE_SAMPLE)[:count].copy()] = torch.arange(count)
    sample = torch.empty(count, extractor.dim)
    for features in workers.shards(location, manifest):
        places = place[statistics.n : statistics.n + len(features)]
        sample[places[places >= 0]] = features[places >= 0]
        statistics.update(features)
    storage.write_bytes(_location(manifest, extractor), statistics.to_bytes())
    if with_sample:
        storage.write_bytes(_location(manifest, extractor, sample=True), safetensors.torch.save({"features": sample}))
    return statistics, sample


def _decode_sample(data: bytes) -> Tensor:
    try:
        return safetensors.torch.load(data)["features"]
    except (SafetensorError, KeyError) as error:
        raise WorldError(f"truncated or damaged features ({len(data)} bytes)") from error


def _location(manifest: Manifest, extractor: FeatureExtractor, *, sample: bool = False) -> str:
    name = f"{_key(manifest, extractor)}{f'-sample-{MOST_FEATURES}' if sample else ''}.safetensors"
    return storage.join(storage.home(), "cache", "reference", name)


def _key(manifest: Manifest, extractor: FeatureExtractor) -> str:
    words = "\n".join([manifest.digest, extractor.name, extractor.sha256, extractor.resize])
    return hashlib.sha256(words.encode()).hexdigest()[:32]
