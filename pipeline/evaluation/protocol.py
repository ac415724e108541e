"""What a Frechet distance is worth is its protocol: two numbers compare only if theirs are the same."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from pipeline.config import EvaluateConfig, SamplingConfig
from pipeline.evaluation.features import FeatureExtractor
from pipeline.images import ROUNDING

__all__ = ["Protocol", "differences"]

_NOT_PROTOCOL = ("code", "note", "ema_profile_error")
"""What is stored with a result beside its protocol."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that a distance depends on beside the weights; stored with every result."""

    metric: str
    features: str
    features_sha256: str
    resize: str
    rounding: str
    reference_digest: str
    """Digest of the data set's manifest; all of its images are the reference."""
    num_images: int
    chunk_size: int
    threads: int
    """torch threads of each chunk: they, like chunk_size, decide the last bits of the images."""
    device: str
    weights: str
    """ema, or how they were made from power-function averages."""
    sampler: str
    """With the options that this sampler has."""
    sampling_steps: int
    """Network evaluations for each image."""
    sample_seed: int
    guidance: float = 1.0
    timestep_spacing: str = "uniform"
    x0_clipping: str = "clip"
    """With the percentile of dynamic thresholding."""
    settings: str = ""
    """What a metric other than the Frechet distance depends on as well."""

    @classmethod
    def of(
        cls, config: EvaluateConfig, extractor: FeatureExtractor, reference_digest: str, weights: str, suffix: str = ""
    ) -> "Protocol":
        """The protocol of an evaluation of some weights, whose metric has their suffix."""
        sampling = config.sampling
        return cls(
            metric=extractor.metric + suffix,
            features=extractor.name,
            features_sha256=extractor.sha256,
            resize=extractor.resize,
            rounding=ROUNDING,
            reference_digest=reference_digest,
            num_images=config.protocol.num_images,
            chunk_size=config.protocol.chunk_size,
            threads=config.cluster.cpus_per_worker,
            device="cuda" if config.cluster.use_gpu else "cpu",
            weights=weights,
            sampler=_sampler_words(sampling),
            sampling_steps=sampling.sampling_steps,
            sample_seed=sampling.sample_seed,
            guidance=sampling.guidance,
            timestep_spacing=sampling.spacing,
            x0_clipping=_clipping_words(sampling),
        )

    @property
    def identity(self) -> str:
        """Hash of the protocol: same identity, same number; a checkpoint that has it is not measured again."""
        return hashlib.sha256(json.dumps(self.to_record(), sort_keys=True).encode()).hexdigest()[:16]

    def to_record(self) -> Mapping[str, str | int | float]:
        """The protocol as JSON values."""
        record = asdict(self)
        return {key: value for key, value in record.items() if _LATER.get(key) != value}


_LATER = {field.name: field.default for field in fields(Protocol) if field.default is not MISSING}
"""Fields younger than the first results: at their default they are left out, so that those keep their identity."""


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two protocols' records, in words; empty if their numbers may be compared."""
    names = [name for name in dict.fromkeys([*now, *then]) if name not in _NOT_PROTOCOL]
    unlike = [name for name in names if then.get(name, _LATER.get(name)) != now.get(name, _LATER.get(name))]
    return [
        f"{name} is {_short(then.get(name, _LATER.get(name)))} and {_short(now.get(name, _LATER.get(name)))}"
        for name in unlike
    ]


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text  # a sha256


def _sampler_words(sampling: SamplingConfig) -> str:
    options = {"ddim": f"(eta={sampling.eta:g})", "ddpm": f"({sampling.variance})", "dpm-solver++": "(2M)"}
    return sampling.sampler + options.get(sampling.sampler, "")


def _clipping_words(sampling: SamplingConfig) -> str:
    dynamic = sampling.x0_clipping == "dynamic"
    return f"dynamic({sampling.x0_percentile:g})" if dynamic else sampling.x0_clipping
