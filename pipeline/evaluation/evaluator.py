"""Checkpoints that lack a result get one: images, features, Frechet distance, logged where training logged."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.config import EvaluateConfig
from pipeline.data.manifest import load_manifest
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.actors import ModelFiles, Workers, open_workers
from pipeline.evaluation.features import FeatureExtractor, load_extractor
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.reference import reference_statistics
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance
from pipeline.evaluation.weights import Candidate, candidates, fetch
from pipeline.provenance import code_record
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["Evaluation", "Failure", "Outcome", "evaluate", "evaluate_last", "select"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One checkpoint's result."""

    run: str
    step: int
    model_id: str
    weights: str
    metric: str
    value: float
    num_images: int
    identity: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A checkpoint that could not be evaluated, and why; it stays pending."""

    run: str
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an evaluation did."""

    evaluated: Sequence[Evaluation] = ()
    failed: Sequence[Failure] = ()

    def text(self) -> str:
        """A line for each checkpoint."""
        lines = [f"{e.run} step {e.step}: {e.metric} {e.value:.4f} on {e.num_images} images" for e in self.evaluated]
        lines += [f"{failure.run} step {failure.step} failed: {failure.reason}" for failure in self.failed]
        return "\n".join(lines) or "nothing to do: every selected checkpoint has this result"


def evaluate(config: EvaluateConfig, tracker: Tracker, todo: Sequence[Candidate]) -> Outcome:
    """Evaluates checkpoints on the Ray cluster that this process has joined.

    One checkpoint that cannot be evaluated does not keep the others from it.

    Args:
        config: Protocol and workers.
        tracker: Connected to MLflow.
        todo: What ``select`` gave.

    Raises:
        UserError: The feature network's weights are refused, or there are not enough GPUs.
    """
    if not todo:
        return Outcome()
    extractor = load_extractor(config.protocol.features, weights=config.protocol.inception_weights)
    num_chunks = math.ceil(config.protocol.num_images / config.protocol.chunk_size)
    evaluated: list[Evaluation] = []
    failed: list[Failure] = []
    with open_workers(config.cluster, config.protocol, most=num_chunks) as workers:
        for candidate in todo:
            checkpoint = candidate.checkpoint
            if len(evaluated) == config.max_checkpoints:
                break  # counted by successes: checkpoints that cannot be evaluated must not keep others waiting
            try:
                evaluated.append(_evaluate_one(config, tracker, candidate, extractor, workers))
            except (UserError, WorldError) as error:
                failed.append(Failure(run=checkpoint.run_name, step=checkpoint.step, reason=str(error)))
                logger.warning("%s step %d cannot be evaluated: %s", checkpoint.run_name, checkpoint.step, error)
    return Outcome(evaluated=evaluated, failed=failed)


def evaluate_last(config: EvaluateConfig, run: str, tracker: Tracker) -> Evaluation:
    """The result of a run's last checkpoint: measured now, or the stored one of the same protocol.

    Raises:
        UserError: As ``select``.
        WorldError: The checkpoint could not be evaluated.
    """
    config = replace(config, run=run, pending=False, last=True)
    outcome = evaluate(config, tracker, select(config, tracker))
    if outcome.failed:
        raise WorldError(f"{run} was trained, but not evaluated: {outcome.failed[0].reason}")
    if outcome.evaluated:
        return outcome.evaluated[0]
    extractor = load_extractor(config.protocol.features, weights=config.protocol.inception_weights)
    candidate = _selected(config, tracker)[0]
    protocol = _protocol(config, candidate, extractor)
    stored = candidate.checkpoint.result(protocol.identity)
    return _evaluation(config, candidate.checkpoint, protocol, stored["metrics"][protocol.metric], seconds=0.0)


def select(config: EvaluateConfig, tracker: Tracker) -> list[Candidate]:
    """Weights of published checkpoints that ``config`` selects and that lack the result, newest first.

    Raises:
        UserError: Unknown experiment or run, a run without checkpoints or with too few snapshots for ``ema_width``,
            refused weights of the feature network.
    """
    extractor = load_extractor(config.protocol.features, weights=config.protocol.inception_weights)
    found = _selected(config, tracker)
    return [c for c in found if not c.checkpoint.has_result(_protocol(config, c, extractor).identity)]


def _selected(config: EvaluateConfig, tracker: Tracker) -> list[Candidate]:
    if config.run is not None:
        checkpoints = _checkpoints_of_run(config.run, tracker)
    else:
        checkpoints = tracker.checkpoints(tracker.experiment(config.experiment, create=False))
    found = candidates(config, tracker, checkpoints)
    if config.step is not None:
        steps = sorted({candidate.checkpoint.step for candidate in found})
        found = [candidate for candidate in found if candidate.checkpoint.step == config.step]
        if not found:
            enough = "" if config.ema_width is None else " that has enough snapshots up to it"
            raise UserError(f"no checkpoint of step {config.step}{enough}; there are {steps}")
    if config.last:
        last: dict[str, Candidate] = {}
        for candidate in found:
            run_id = candidate.checkpoint.run_id
            last[run_id] = max(last.get(run_id, candidate), candidate, key=lambda c: c.checkpoint.step)
        found = [candidate for candidate in found if candidate is last[candidate.checkpoint.run_id]]
    return found


def _checkpoints_of_run(name: str, tracker: Tracker) -> list[Checkpoint]:
    run = tracker.find_run(name)
    if run is None:
        known = ", ".join(tracker.run_names()) or "none"
        raise UserError(f"no run is called {name!r}; the newest are: {known}")
    found = tracker.checkpoints(run.info.experiment_id, run_id=run.info.run_id)
    if not found:
        raise UserError(f"run {name!r} has no published checkpoint yet")
    return found


def _protocol(config: EvaluateConfig, candidate: Candidate, extractor: FeatureExtractor) -> Protocol:
    digest = candidate.checkpoint.tags["data.digest"]
    return Protocol.of(config, extractor, digest, candidate.weights, candidate.metric_suffix)


def _evaluate_one(
    config: EvaluateConfig, tracker: Tracker, candidate: Candidate, extractor: FeatureExtractor, workers: Workers
) -> Evaluation:
    started = time.monotonic()
    checkpoint = candidate.checkpoint
    location = checkpoint.tags["data.location"]
    manifest = load_manifest(location)
    protocol = _protocol(config, candidate, extractor)
    if manifest.digest != protocol.reference_digest:
        raise WorldError(
            f"{location} is no longer the data set that {checkpoint.run_name} was trained on "
            f"(digest {manifest.digest[:12]}, was {protocol.reference_digest[:12]})"
        )
    reference = reference_statistics(location, manifest, extractor, workers)
    files, profile_error = fetch(candidate, tracker)
    generated = _generated_statistics(config, checkpoint, files, extractor.dim, workers)
    value = frechet_distance(generated, reference)
    code = code_record()
    record = {**protocol.to_record(), "code": code.get("git_commit", code["source_sha256"])}
    if profile_error is not None:
        record["ema_profile_error"] = f"{profile_error:.2g}"
    tracker.log_result(checkpoint, identity=protocol.identity, protocol=record, metrics={protocol.metric: value})
    return _evaluation(config, checkpoint, protocol, value, seconds=time.monotonic() - started)


def _evaluation(
    config: EvaluateConfig, checkpoint: Checkpoint, protocol: Protocol, value: float, *, seconds: float
) -> Evaluation:
    return Evaluation(
        run=checkpoint.run_name,
        step=checkpoint.step,
        model_id=checkpoint.model_id,
        weights=protocol.weights,
        metric=protocol.metric,
        value=value,
        num_images=config.protocol.num_images,
        identity=protocol.identity,
        seconds=seconds,
    )


def _generated_statistics(
    config: EvaluateConfig, checkpoint: Checkpoint, files: ModelFiles, dim: int, workers: Workers
) -> FeatureStatistics:
    """Statistics of the first ``num_images`` images; chunks are always whole, the surplus is dropped."""
    wanted, size = config.protocol.num_images, config.protocol.chunk_size
    statistics, started = FeatureStatistics.empty(dim), time.monotonic()
    next_line = started + 10
    for features, _ in workers.chunks(files, config.sampling, num_chunks=math.ceil(wanted / size), size=size):
        statistics.update(features[: wanted - statistics.n].to(torch.float64))
        if time.monotonic() > next_line:
            next_line += 10
            rate = statistics.n / (time.monotonic() - started)
            logger.info(
                "%s step %d: %d/%d images, %.1f images/s, about %.0f s left",
                checkpoint.run_name,
                checkpoint.step,
                statistics.n,
                wanted,
                rate,
                (wanted - statistics.n) / rate,
            )
    return statistics
