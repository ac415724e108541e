"""Checkpoints that lack a result get one, each from one evaluator; the result goes where training logged."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.actors import Workers, open_workers
from pipeline.evaluation.features import FeatureExtractor, load_extractor
from pipeline.evaluation.measure import Model, OutOfTimeError, measure, reference_of
from pipeline.evaluation.outcome import Evaluation, Failure, Outcome, Skipped
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.selection import fitting, images_location, protocol_of, select, selected
from pipeline.evaluation.weights import Candidate, fetch
from pipeline.provenance import code_record
from pipeline.storage import UnreachableError
from pipeline.tracking import Checkpoint, Lease, LostLeaseError, Standing, Tracker, standing

__all__ = ["Deadline", "evaluate", "evaluate_last", "free", "num_chunks"]

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Deadline:
    """When an evaluation has to stop, by ``time.monotonic``."""

    moment: float = math.inf

    @classmethod
    def of(cls, config: EvaluateConfig) -> "Deadline":
        """``max_minutes`` from now on."""
        return cls() if config.max_minutes is None else cls(time.monotonic() + 60 * config.max_minutes)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.moment


def num_chunks(config: EvaluateConfig) -> int:
    """Chunks of each checkpoint."""
    return math.ceil(config.protocol.num_images / config.protocol.chunk_size)


def evaluate(
    config: EvaluateConfig, tracker: Tracker, todo: Sequence[Candidate], deadline: Deadline = Deadline()
) -> Outcome:
    """Evaluates checkpoints on the Ray cluster that this process has joined.

    One checkpoint that cannot be evaluated does not keep the others from it; one that another evaluator has is left to
    it.

    Args:
        config: Protocol and workers.
        tracker: Connected to MLflow.
        todo: What ``select`` gave.
        deadline: When to stop; what is half done then is kept.

    Raises:
        UserError: The feature network's weights are refused, or there are not enough GPUs.
    """
    if not todo:
        return Outcome()
    extractor = load_extractor(config.protocol.features, weights=config.protocol.inception_weights)
    evaluated: list[Evaluation] = []
    failed: list[Failure] = []
    skipped: list[Skipped] = []
    with open_workers(config.cluster, config.protocol, most=num_chunks(config)) as workers:
        one = partial(_leased, config, tracker, extractor=extractor, workers=workers, deadline=deadline)
        for place, candidate in enumerate(todo):
            # Counted by successes: checkpoints that cannot be evaluated must not keep others waiting.
            if len(evaluated) == config.max_checkpoints:
                break
            done = None if deadline.is_over else one(candidate)
            match done:
                case Evaluation():
                    evaluated.append(done)
                case Failure():
                    failed.append(done)
                case Skipped():
                    skipped.append(done)
                case None:
                    logger.info("--max-minutes are over; %d checkpoints stay pending", len(todo) - place)
                    break
    return Outcome(evaluated=evaluated, failed=failed, skipped=skipped)


def evaluate_last(config: EvaluateConfig, run: str, tracker: Tracker) -> Evaluation:
    """The result of a run's last checkpoint: measured now, by another evaluator, or before, by the same protocol.

    Raises:
        UserError: As ``select``.
        WorldError: The checkpoint could not be evaluated.
    """
    config = replace(config, run=run, pending=False, last=True, retry_failed=True)
    while todo := fitting(config, tracker, select(config, tracker))[0]:
        outcome = evaluate(config, tracker, todo)
        if outcome.failed:
            raise WorldError(f"{run} was trained, but not evaluated: {outcome.failed[0].reason}")
        if outcome.evaluated:
            return outcome.evaluated[0]
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # Another evaluator is at it.
    extractor = load_extractor(config.protocol.features, weights=config.protocol.inception_weights)
    candidate = selected(config, tracker)[0]
    protocol = protocol_of(config, candidate, extractor)
    stored = candidate.checkpoint.result(protocol.identity)
    return _evaluation(config, candidate.checkpoint, protocol, stored["metrics"][protocol.metric], seconds=0.0)


def free(
    config: EvaluateConfig, todo: Sequence[Candidate], extractor: FeatureExtractor
) -> tuple[list[Candidate], list[Skipped]]:
    """Parts candidates into those that may be evaluated now and those that somebody has or that have failed."""
    found: list[Candidate] = []
    skipped: list[Skipped] = []
    for candidate in todo:
        stands = standing(candidate.checkpoint, protocol_of(config, candidate, extractor).identity)
        if (obstacle := _obstacle(config, stands)) is None:
            found.append(candidate)
        else:
            skipped.append(_skipped(candidate, obstacle))
    return found, skipped


def _obstacle(config: EvaluateConfig, stands: Standing) -> str | None:
    if stands.holder is not None:
        return f"{stands.holder.owner} is evaluating it"
    if stands.has_failed and not config.retry_failed:
        return f"it failed {stands.failures} times ({stands.reason}); --retry-failed tries again"
    return None


def _skipped(candidate: Candidate, reason: str) -> Skipped:
    return Skipped(run=candidate.checkpoint.run_name, step=candidate.checkpoint.step, reason=reason)


def _leased(
    config: EvaluateConfig,
    tracker: Tracker,
    candidate: Candidate,
    *,
    extractor: FeatureExtractor,
    workers: Workers,
    deadline: Deadline,
) -> Evaluation | Failure | Skipped | None:
    """Evaluates a checkpoint unless somebody else does; None if the time is over."""
    candidate = replace(candidate, checkpoint=tracker.refresh(candidate.checkpoint))
    protocol = protocol_of(config, candidate, extractor)
    if candidate.checkpoint.has_result(protocol.identity) and config.save_images is None:
        return _skipped(candidate, "another evaluator has measured it meanwhile")
    stands = standing(candidate.checkpoint, protocol.identity)
    if (obstacle := _obstacle(config, stands)) is not None:
        return _skipped(candidate, obstacle)
    lease = tracker.take_lease(candidate.checkpoint, protocol.identity, stands)
    if lease is None:
        return _skipped(candidate, "another evaluator took it at the same moment")
    with lease:
        try:
            return _evaluate_one(config, tracker, candidate, protocol, extractor, workers, lease, deadline)
        except OutOfTimeError:
            lease.release()
            return None
        except LostLeaseError as error:
            return _skipped(candidate, str(error))
        except (UserError, WorldError) as error:
            if isinstance(error, UnreachableError):
                lease.release()  # Not the checkpoint's fault.
            else:
                lease.fail(str(error))
            run, step = candidate.checkpoint.run_name, candidate.checkpoint.step
            logger.warning("%s step %d cannot be evaluated: %s", run, step, error)
            return Failure(run=run, step=step, reason=str(error))


def _evaluate_one(
    config: EvaluateConfig,
    tracker: Tracker,
    candidate: Candidate,
    protocol: Protocol,
    extractor: FeatureExtractor,
    workers: Workers,
    lease: Lease,
    deadline: Deadline,
) -> Evaluation:
    started = time.monotonic()
    checkpoint, location = candidate.checkpoint, candidate.checkpoint.tags["data.location"]
    files, profile_error = fetch(candidate, tracker)
    model = Model(
        name=f"{checkpoint.run_name} step {checkpoint.step}",
        files=files,
        meta=files.read_meta(),
        images=images_location(config, candidate.name),
    )
    wants_sheet = candidate.width is None and not tracker.has_sheet(checkpoint)
    found = measure(
        config,
        model,
        reference_of(location, model, digest=protocol.reference_digest),
        location,
        protocol=protocol,
        extractor=extractor,
        workers=workers,
        after_chunk=partial(_after_chunk, lease, deadline),
        on_sheet=partial(tracker.log_sheet, checkpoint) if wants_sheet else None,
    )
    code = code_record()
    record = {**protocol.to_record(), "code": code.get("git_commit", code["source_sha256"])}
    if profile_error is not None:
        record["ema_profile_error"] = f"{profile_error:.2g}"
    if found.note:
        record["note"] = found.note
    if not checkpoint.has_result(protocol.identity):  # Else only the images were wanted.
        lease.check()
        tracker.log_result(checkpoint, identity=protocol.identity, protocol=record, metrics=found.metrics)
    found.gathering.discard()
    value, seconds = found.metrics[protocol.metric], time.monotonic() - started
    logger.info("%s: %s %.4f", model.name, protocol.metric, value)
    evaluation = _evaluation(config, checkpoint, protocol, value, seconds=seconds)
    return replace(evaluation, images=model.images, note=found.note)


def _after_chunk(lease: Lease, deadline: Deadline) -> None:
    lease.advance()
    if lease.is_lost:
        lease.check()
    if deadline.is_over:
        raise OutOfTimeError


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
