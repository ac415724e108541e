"""One model is measured: images in chunks, features, statistics, Frechet distance."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from pipeline import storage
from pipeline.config import EvaluateConfig, SamplingConfig
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.actors import ModelFiles, Workers
from pipeline.evaluation.feature_sample import FeatureSample
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.gathering import Accumulator, Chunk, Gathering, Moments, OfFeatures
from pipeline.evaluation.metrics import Gathered, compute, needs_sample, score_accumulator
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.reference import reference_sample, reference_statistics
from pipeline.evaluation.saved_images import SavedImages
from pipeline.evaluation.statistics import FeatureStatistics
from pipeline.generation import labels_of_chunk
from pipeline.images import image_grid
from pipeline.model_folder import Meta

__all__ = ["Measurement", "Model", "OutOfTimeError", "measure", "reference_of"]

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_SHEET_IMAGES = 64


class OutOfTimeError(Exception):
    """``--max-minutes`` are over; the chunks so far are kept."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured."""

    name: str
    """In words, for messages."""
    files: ModelFiles
    meta: Meta
    images: str | None
    """Where its images are to be saved."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The numbers of one model."""

    metrics: Mapping[str, Mapping[str, float]]
    """For each metric of ``--metrics`` its values, by the names under which they are logged."""
    note: str | None
    """What makes them worth less than they look."""
    gathering: Gathering
    """To be discarded once the numbers are safe."""


def reference_of(location: str, model: Model, *, digest: str | None = None) -> Manifest:
    """The data set that a model is compared with.

    Args:
        location: The data set.
        model: Whose images must have its size and channels.
        digest: What the data set was when the model was trained; None: any will do.

    Raises:
        UserError: No data set, or one of another size or number of channels.
        WorldError: The data set is not what it was, or storage does not answer.
    """
    manifest, made = load_manifest(location), model.meta.config.model
    if (manifest.image_size, manifest.image_channels) != (made.image_size, made.image_channels):
        theirs, ours = (_shape(size, n) for size, n in (
            (manifest.image_size, manifest.image_channels), (made.image_size, made.image_channels)
        ))  # fmt: skip
        raise UserError(
            f"{location} holds images of {theirs}, {model.name} makes {ours}; give a data set of that shape"
        )
    if digest is not None and manifest.digest != digest:
        raise WorldError(
            f"{location} is no longer the data set that {model.name} was trained on "
            f"(digest {manifest.digest[:12]}, was {digest[:12]})"
        )
    return manifest


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
    for name, value in (item for group in values.values() for item in group.items()):
        if not math.isfinite(value):
            raise WorldError(f"{name} of {model.name} came out as {value}")
    note = _note(gathered.generated.n, reference.n, extractor.dim)
    if note:
        logger.warning("%s: %s", model.name, note)
    return Measurement(metrics=values, note=note, gathering=gathering)


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
    progress = _Progress(model.name, wanted, done=min(wanted, gathering.next_chunk * size))
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


class _Progress:
    """A line with the speed and the time left, now and then."""

    def __init__(self, name: str, wanted: int, *, done: int) -> None:
        self._name, self._wanted, self._before, self._done = name, wanted, done, done
        self._began = time.monotonic()
        self._next_line = self._began + _SECONDS_BETWEEN_LINES

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + _SECONDS_BETWEEN_LINES
        rate = (self._done - self._before) / (now - self._began)
        logger.info(
            "%s: %d/%d images, %.1f images/s, about %.0f s left",
            self._name,
            self._done,
            self._wanted,
            rate,
            (self._wanted - self._done) / rate,
        )


def _note(generated: int, reference: int, dim: int) -> str | None:
    fewer = min(generated, reference)
    if fewer > dim:
        return None
    which = "generated" if generated <= reference else "reference"
    return f"{fewer} {which} images for features of length {dim}: the covariance is singular and the bias large"


def _shape(size: int, channels: int) -> str:
    return f"{channels}x{size}x{size}"
