"""One model is measured: images in chunks, features, statistics, Frechet distance."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from pipeline import storage
from pipeline.config import EvaluateConfig, SamplingConfig
from pipeline.data.manifest import Manifest
from pipeline.errors import WorldError
from pipeline.evaluation.actors import Workers
from pipeline.evaluation.bound import BOUND_NAMES
from pipeline.evaluation.eta import Progress
from pipeline.evaluation.feature_sample import FeatureSample
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.gathering import Accumulator, Chunk, Gathering, Moments, OfFeatures
from pipeline.evaluation.measure_bound import measure_bound
from pipeline.evaluation.metrics import BOUND, Gathered, compute, needs_sample, score_accumulator
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.reference import reference_sample, reference_statistics
from pipeline.evaluation.saved_images import SavedImages
from pipeline.evaluation.statistics import FeatureStatistics
from pipeline.evaluation.subject import Model, OutOfTimeError
from pipeline.generation import labels_of_chunk
from pipeline.images import image_grid

__all__ = ["Measurement", "measure"]

logger = logging.getLogger(__name__)

_SHEET_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The numbers of one model."""

    metrics: Mapping[str, Mapping[str, float]]
    """For each metric of ``--metrics`` its values, by the names under which they are logged."""
    note: str | None
    """What makes them worth less than they look."""
    gatherings: Sequence[Gathering]
    """To be discarded once the numbers are safe."""
    terms: str | None = None
    """The terms of the variational bound as CSV, if it was measured."""

    def discard(self) -> None:
        """Removes what was kept for going on after a kill."""
        for gathering in self.gatherings:
            gathering.discard()


def measure(
    config: EvaluateConfig,
    model: Model,
    manifest: Manifest,
    location: str,
    *,
    protocol: Protocol,
    metrics: Mapping[str, Protocol],
    extractor: FeatureExtractor,
    workers: Workers,
    after_chunk: Callable[[], None] = lambda: None,
    on_sheet: Callable[[np.ndarray], None] | None = None,
) -> Measurement:
    """Makes the chunks that an earlier evaluation has not left, and computes the metrics.

    Args:
        config: Number and size of the chunks, and how to sample.
        model: What makes the images.
        manifest: The reference data set, whose images ``model`` fits.
        location: Where that lies.
        protocol: The protocol of the images and of their Frechet distance.
        metrics: What to compute, and by which protocol; may be empty.
        extractor: The feature network.
        workers: The actors.
        after_chunk: Called after each chunk; what it raises ends the work.
        on_sheet: Takes a sample sheet, uint8 [H, W, C], of the first images.

    Raises:
        WorldError: Images, features or the reference are damaged, or a server does not answer.
        OutOfTimeError: As ``after_chunk`` raised it; what was made is kept.
    """
    of_images = {metric: own for metric, own in metrics.items() if metric != BOUND}
    found = Measurement(metrics={}, note=None, gatherings=[])
    if of_images or model.images is not None:
        found = _measure_images(
            config, model, manifest, location, protocol, of_images, extractor, workers, after_chunk, on_sheet
        )
    if BOUND in metrics:
        likelihood, gathering = measure_bound(config, model, metrics[BOUND], workers, after_chunk)
        suffix = metrics[BOUND].metric.removeprefix(BOUND_NAMES[0])
        values = {name + suffix: value for name, value in zip(BOUND_NAMES, likelihood.values(), strict=True)}
        found = replace(
            found,
            metrics={**found.metrics, BOUND: values},
            gatherings=[*found.gatherings, gathering],
            terms=likelihood.to_csv(),
        )
    for name, value in (item for group in found.metrics.values() for item in group.items()):
        if not math.isfinite(value):
            raise WorldError(f"{name} of {model.name} came out as {value}")
    return found


def _measure_images(
    config: EvaluateConfig,
    model: Model,
    manifest: Manifest,
    location: str,
    protocol: Protocol,
    metrics: Mapping[str, Protocol],
    extractor: FeatureExtractor,
    workers: Workers,
    after_chunk: Callable[[], None],
    on_sheet: Callable[[np.ndarray], None] | None,
) -> Measurement:
    """All metrics of generated images, from one pass."""
    _, sample_of_real = needs_sample([*metrics])
    real = reference_sample(location, manifest, extractor, workers) if sample_of_real else None
    reference = reference_statistics(location, manifest, extractor, workers)
    key = {
        "model": model.files.model_id,
        "weights": storage.sha256_hex(model.files.weights),
        "meta": storage.sha256_hex(model.files.meta),
        "protocol": protocol.identity,
        "kept": " ".join(_kept_for(metrics)),
    }
    make = partial(_accumulators, config, model, manifest, extractor, protocol, metrics)
    gathering = Gathering(key | _saved(model), make)
    _gather(config, model, gathering, workers, after_chunk, on_sheet)
    if isinstance(saved := gathering.accumulators.get("saved"), SavedImages):
        saved.finish()
    gathered = _gathered(gathering.accumulators, reference, real)
    values = {metric: compute(metric, gathered, own, extractor) for metric, own in metrics.items()}
    note = _note(gathered.generated.n, reference.n, extractor.dim)
    return Measurement(metrics=values, note=note, gatherings=[gathering])


def _kept_for(metrics: Collection[str]) -> list[str]:
    """Which accumulators metrics need beside the moments."""
    sample, _ = needs_sample([*metrics])
    return [*(["sample"] if sample else []), *(["score"] if "is" in metrics else [])]


def _gathered(accumulators: Mapping[str, Accumulator], reference: FeatureStatistics, real: Tensor | None) -> Gathered:
    moments, sample, score = (accumulators.get(name) for name in ("moments", "sample", "score"))
    assert isinstance(moments, Moments)
    return Gathered(
        generated=moments.statistics,
        reference=reference,
        sample=sample.inner.features if isinstance(sample, OfFeatures) else None,
        reference_sample=real,
        score=score.inner if isinstance(score, OfFeatures) else None,
    )


def _accumulators(
    config: EvaluateConfig,
    model: Model,
    manifest: Manifest,
    extractor: FeatureExtractor,
    protocol: Protocol,
    metrics: Collection[str],
) -> dict[str, Accumulator]:
    found: dict[str, Accumulator] = {"moments": Moments(extractor.dim)}
    for name in _kept_for(metrics):
        if name == "sample":
            found[name] = OfFeatures(FeatureSample(extractor.dim))
        else:
            found[name] = OfFeatures(score_accumulator(extractor, config.protocol.num_images))
    if model.images is not None:
        num_classes = model.meta.config.model.num_classes
        labels = partial(_labels, config.sampling, num_classes, config.protocol.chunk_size) if num_classes else None
        identity = storage.sha256_hex(f"{storage.sha256_hex(model.files.weights)} {protocol.identity}".encode())
        found["saved"] = SavedImages(
            model.images,
            source=f"{protocol.num_images} images of {model.name}",
            identity=identity,
            class_names=manifest.class_names,
            labels_of=labels,
        )
    return found


def _saved(model: Model) -> dict[str, str]:
    return {} if model.images is None else {"images": model.images}


def _labels(sampling: SamplingConfig, num_classes: int, size: int, chunk: Chunk) -> Tensor:
    return labels_of_chunk(sampling, num_classes, size=size, chunk=chunk.number)[: len(chunk.features)]


def _gather(
    config: EvaluateConfig,
    model: Model,
    gathering: Gathering,
    workers: Workers,
    after_chunk: Callable[[], None],
    on_sheet: Callable[[np.ndarray], None] | None,
) -> None:
    """Chunks are always whole; of the last one the surplus over ``num_images`` is dropped."""
    wanted, size = config.protocol.num_images, config.protocol.chunk_size
    numbers = range(gathering.next_chunk, math.ceil(wanted / size))
    if gathering.next_chunk:
        logger.info("%s: going on after %d chunks", model.name, gathering.next_chunk)
    progress = Progress(model.name, wanted, done=min(wanted, gathering.next_chunk * size))
    with_images = numbers if model.images is not None else (0,) if on_sheet is not None else ()
    try:
        for number, features, images in workers.chunks(
            model.files, config.sampling, numbers=numbers, size=size, with_images=with_images
        ):
            count = min(size, wanted - number * size)
            if number == 0 and on_sheet is not None and images is not None:
                on_sheet(image_grid(images[:_SHEET_IMAGES]).permute(1, 2, 0).numpy())
            kept = images[:count] if images is not None and model.images is not None else None
            gathering.add(Chunk(number=number, features=features[:count], images=kept))
            progress.add(count)
            after_chunk()
    except OutOfTimeError:
        gathering.keep()
        raise


def _note(generated: int, reference: int, dim: int) -> str | None:
    fewer = min(generated, reference)
    if fewer > dim:
        return None
    which = "generated" if generated <= reference else "reference"
    return f"{fewer} {which} images for features of length {dim}: the covariance is singular and the bias large"
