"""A rough Frechet distance for a look during training: few images, embedded features, a name that says so."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import read_images
from pipeline.evaluation.features import METRICS, FeatureExtractor, load_extractor
from pipeline.evaluation.reference import reference_statistics
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance

__all__ = ["RoughDistance"]

_FEATURES = "efficientnet-lite0"
_FEATURE_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class RoughDistance:
    """The Frechet distance on the embedded features, by no protocol: it shows a trend within one run.

    With few images it is biased upwards by much (see ``frechet_distance``), so its name carries their number and it is
    never logged under the name of an evaluation.
    """

    num_images: int

    @classmethod
    def of(cls, config: TrainConfig) -> "RoughDistance | None":
        """What the knobs ask for: None if ``quality_images`` is 0."""
        return cls(num_images=config.quality_images) if config.quality_images else None

    @property
    def metric(self) -> str:
        """For example ``quality/fd_efficientnet_lite0_256``."""
        return f"quality/{METRICS[_FEATURES]}_{self.num_images}"

    def distance(self, images: Iterable[Tensor], location: str, manifest: Manifest, device: torch.device) -> float:
        """The distance of the first ``num_images`` images from all images of a data set.

        Args:
            images: uint8 [B, C, H, W] each.
            location: The data set, whose statistics are computed if nobody has done so before.
            manifest: The data set's.
            device: Where features are computed.

        Raises:
            WorldError: Images or features are damaged, or storage does not answer.
        """
        extractor = load_extractor(_FEATURES, device=device)
        reference = reference_statistics(location, manifest, extractor, _Here(extractor))
        generated = FeatureStatistics.empty(extractor.dim)
        for part in images:
            generated.update(_features(extractor, part[: self.num_images - generated.n]))
        return frechet_distance(generated, reference)


class _Here:
    """Features of a data set, in this process."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self._extractor = extractor

    def shards(self, location: str, manifest: Manifest) -> Iterator[Tensor]:
        """Features of a data set's images, shard by shard."""
        for shard in range(len(manifest.shards)):
            yield _features(self._extractor, read_images(location, manifest, shard))


def _features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    if len(images) == 0:
        return torch.empty(0, extractor.dim)
    return torch.cat([extractor(part).cpu() for part in torch.split(images, _FEATURE_BATCH)])
