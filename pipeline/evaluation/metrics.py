"""What can be computed from one pass over generated images, by the names of ``--metrics``.

Each metric has a protocol, and with it an identity, of its own. So one that is asked for later is the only one that is
missing, and the results that are there stay valid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.config import METRICS, EvaluateConfig
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.bound import bound_protocol
from pipeline.evaluation.feature_sample import MOST_FEATURES
from pipeline.evaluation.features import FeatureExtractor, NetworkExtractor
from pipeline.evaluation.frechet import LEVELS, NORMAL_95, frechet_infinity, frechet_standard_error
from pipeline.evaluation.inception import NUM_CLASSES, Inception
from pipeline.evaluation.inception_score import SPLITS, InceptionScore
from pipeline.evaluation.kernel_distance import block_size, kernel_distance
from pipeline.evaluation.neighbours import BALL_NEIGHBOURS, DENSITY_NEIGHBOURS, overlap
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance

__all__ = ["BOUND", "Gathered", "compute", "metric_protocol", "needs_sample", "score_accumulator"]

BOUND = "bpd"
"""The metric that is computed from held-out images instead of generated ones."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What metrics are computed from; parts that no metric asks for may be missing."""

    generated: FeatureStatistics
    reference: FeatureStatistics
    sample: Tensor | None = None
    """Features of generated images in random order, float32 [n, d], n at most ``MOST_FEATURES``."""
    reference_sample: Tensor | None = None
    """Features of real images in random order, likewise."""
    score: InceptionScore | None = None


def needs_sample(metrics: Sequence[str]) -> tuple[bool, bool]:
    """Whether single features are needed of generated, and of real images."""
    return bool({"fd-interval", "fd-infinity", "kid", "prdc"} & {*metrics}), bool({"kid", "prdc"} & {*metrics})


def score_accumulator(extractor: FeatureExtractor, num_images: int) -> InceptionScore:
    """The accumulator of ``is``.

    Raises:
        UserError: The features are not those of the Inception network, or there are too few images.
    """
    network = extractor.network if isinstance(extractor, NetworkExtractor) else None
    if not isinstance(network, Inception):
        raise UserError(f"--metrics is: {extractor.name} tells no classes; give --features inception")
    if network.head is None:
        raise UserError("--metrics is: these Inception weights have no classifier 'fc.weight'; give the public file")
    if num_images < SPLITS:
        raise UserError(f"--metrics is: its {SPLITS} parts need at least {SPLITS} images, not {num_images}")
    return InceptionScore(network.logits, num_images=num_images, num_classes=NUM_CLASSES)


def metric_protocol(
    metric: str, of_distance: Protocol, extractor: FeatureExtractor, config: EvaluateConfig
) -> Protocol:
    """The protocol of a metric: that of the Frechet distance with another name, and what this metric adds.

    Args:
        metric: One of ``METRICS``.
        of_distance: The Frechet distance's.
        extractor: The feature network.
        config: What ``bpd`` is measured on.

    Raises:
        UserError: The data set for ``bpd`` is not there.
    """
    if metric == "fd":
        return of_distance
    suffix = of_distance.metric.removeprefix(extractor.metric)
    if metric == BOUND:
        return bound_protocol(config, of_distance, suffix)
    return replace(of_distance, metric=_names(metric, extractor)[0] + suffix, settings=_SETTINGS[metric])


def compute(metric: str, gathered: Gathered, protocol: Protocol, extractor: FeatureExtractor) -> dict[str, float]:
    """The values of a metric by the names under which they are logged; the first is ``protocol.metric``.

    Args:
        metric: One of ``METRICS`` but ``BOUND``, which needs no generated images.
        gathered: With the parts that it needs.
        protocol: As ``metric_protocol`` gave it.
        extractor: The feature network.

    Raises:
        WorldError: There are too few images for this metric, here or in the data set.
    """
    names = _names(metric, extractor)
    suffix = protocol.metric.removeprefix(names[0])
    try:
        values = _COMPUTE[metric](gathered)
    except ValueError as error:
        raise WorldError(f"{names[0]} cannot be computed: {error}") from error
    return {name + suffix: value for name, value in zip(names, values, strict=True)}


def _names(metric: str, extractor: FeatureExtractor) -> tuple[str, ...]:
    distance, word = extractor.metric, extractor.metric.removeprefix("fd_")
    word = "inception" if word == "fid" else word
    kernel = "kid" if word == "inception" else f"kd_{word}"
    return {
        "fd": (distance,),
        "fd-interval": (distance, *(f"{distance}_{name}" for name in ("stderr", "low", "high"))),
        "fd-infinity": (f"{distance}_infinity",),
        "kid": (kernel, f"{kernel}_stderr"),
        "prdc": tuple(f"{name}_{word}" for name in ("precision", "recall", "density", "coverage")),
        "is": ("inception_score", "inception_score_std"),
    }[metric]


def _interval(gathered: Gathered) -> tuple[float, ...]:
    assert gathered.sample is not None
    value = frechet_distance(gathered.generated, gathered.reference)
    error = frechet_standard_error(gathered.sample, gathered.generated, gathered.reference)
    return value, error, max(0.0, value - NORMAL_95 * error), value + NORMAL_95 * error


def _infinity(gathered: Gathered) -> tuple[float, ...]:
    assert gathered.sample is not None
    if len(gathered.sample) < 2 * LEVELS:
        raise ValueError(f"it needs at least {2 * LEVELS} images, here are {len(gathered.sample)}")
    return (frechet_infinity(gathered.sample, gathered.reference),)


def _kernel(gathered: Gathered) -> tuple[float, ...]:
    assert gathered.sample is not None
    assert gathered.reference_sample is not None
    found = kernel_distance(gathered.sample, gathered.reference_sample)
    return found.value, found.standard_error


def _overlap(gathered: Gathered) -> tuple[float, ...]:
    assert gathered.sample is not None
    assert gathered.reference_sample is not None
    # Balls shrink as sets grow, so both sets count with the same number.
    n = min(len(gathered.sample), len(gathered.reference_sample))
    found = overlap(gathered.sample[:n], gathered.reference_sample[:n])
    return found.precision, found.recall, found.density, found.coverage


def _score(gathered: Gathered) -> tuple[float, ...]:
    assert gathered.score is not None
    return gathered.score.score()


_COMPUTE: Mapping[str, Callable[[Gathered], tuple[float, ...]]] = {
    "fd": lambda gathered: (frechet_distance(gathered.generated, gathered.reference),),
    "fd-interval": _interval,
    "fd-infinity": _infinity,
    "kid": _kernel,
    "prdc": _overlap,
    "is": _score,
}
assert _COMPUTE.keys() | {BOUND} == {*METRICS}

_SAMPLE = f"of at most {MOST_FEATURES} images"
_SETTINGS: Mapping[str, str] = {
    "fd-interval": f"infinitesimal jackknife {_SAMPLE}, 95 %",
    "fd-infinity": f"line over 1/N, {LEVELS} levels {_SAMPLE}",
    "kid": f"polynomial of degree 3, disjoint blocks of at most {block_size(10**9)}, {_SAMPLE} each",
    "prdc": f"k = {BALL_NEIGHBOURS} and {DENSITY_NEIGHBOURS}, equal numbers {_SAMPLE}",
    "is": f"{SPLITS} parts in order, logits without bias",
}
"""What each protocol says beside that of the Frechet distance."""
