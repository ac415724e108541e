"""Checkpoints that lack a result get one, each from one evaluator; the result goes where training logged."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.actors import Workers, open_workers
from pipeline.evaluation.features import FeatureExtractor, extractor_of
from pipeline.evaluation.measure import measure
from pipeline.evaluation.outcome import Evaluation, Failure, Outcome, Skipped
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.selection import fitting, images_location, lacking, protocol_of, protocols_of, select, selected
from pipeline.evaluation.subject import Model, OutOfTimeError, reference_of
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
    config: EvaluateConfig,
    tracker: Tracker,
    todo: Sequence[Candidate],
    deadline: Deadline = Deadline(),
    *,
    on_result: Callable[[Evaluation], None] = lambda evaluation: None,
    logged_under: str = "",
    workers: Workers | None = None,
) -> Outcome:
    """Evaluates checkpoints on the Ray cluster that this process has joined.

    One checkpoint that cannot be evaluated does not keep the others from it; one that another evaluator has is left to
    it.

    Args:
        config: Protocol and workers.
        tracker: Connected to MLflow.
        todo: What ``select`` gave.
        deadline: When to stop; what is half done then is kept.
        on_result: Told of each result once it is logged; an interrupt may come before this function returns it.
        logged_under: Added to the names of the run's metrics, so that the results make a curve of their own.
        workers: Actors that are there already, of these ``cluster`` and ``protocol`` knobs.

    Raises:
        UserError: The feature network's weights are refused, or there are not enough GPUs.
    """
    if not todo:
        return Outcome()
    extractor = extractor_of(config.protocol)
    evaluated: list[Evaluation] = []
    failed: list[Failure] = []
    skipped: list[Skipped] = []
    opened = open_workers(config.cluster, config.protocol, most=num_chunks(config))
    with opened if workers is None else contextlib.nullcontext(workers) as crew:
        one = partial(
            _leased,
            config,
            tracker,
            extractor=extractor,
            workers=crew,
            deadline=deadline,
            logged_under=logged_under,
        )
        for place, candidate in enumerate(todo):
            # Counted by successes: checkpoints that cannot be evaluated must not keep others waiting.
            if len(evaluated) == config.max_checkpoints:
                break
            done = None if deadline.is_over else one(candidate)
            match done:
                case Evaluation():
                    evaluated.append(done)
                    on_result(done)
                case Failure():
                    failed.append(done)
                case Skipped():
                    skipped.append(done)
                case None:
                    logger.info("--max-minutes are over; %d checkpoints stay pending", len(todo) - place)
                    break
    return Outcome(evaluated=evaluated, failed=failed, skipped=skipped)


def evaluate_last(
    config: EvaluateConfig, run: str, tracker: Tracker, *, logged_under: str = "", workers: Workers | None = None
) -> Evaluation:
    """The result of a run's last checkpoint: measured now, by another evaluator, or before, by the same protocol.

    Args:
        config: The protocol; with ``step`` that step's checkpoint instead of the last.
        run: The run's name.
        tracker: Connected to MLflow.
        logged_under: As for ``evaluate``.
        workers: As for ``evaluate``.

    Raises:
        UserError: As ``select``.
        UnreachableError: A server is away.
        WorldError: The checkpoint could not be evaluated.
    """
    config = replace(config, run=run, pending=False, last=True, retry_failed=True)
    while todo := fitting(config, tracker, select(config, tracker))[0]:
        outcome = evaluate(config, tracker, todo, logged_under=logged_under, workers=workers)
        if outcome.failed:
            kind = UnreachableError if outcome.failed[0].unreachable else WorldError
            raise kind(f"{run} was trained, but not evaluated: {outcome.failed[0].reason}")
        if outcome.evaluated:
            return outcome.evaluated[0]
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # Another evaluator is at it.
    extractor = extractor_of(config.protocol)
    candidate = selected(config, tracker)[0]
    protocols = protocols_of(config, protocol_of(config, candidate, extractor), extractor)
    return _evaluation(config, candidate.checkpoint, protocols, _stored(candidate.checkpoint, protocols), seconds=0.0)


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
    logged_under: str,
) -> Evaluation | Failure | Skipped | None:
    """Evaluates a checkpoint unless somebody else does; None if the time is over."""
    candidate = replace(candidate, checkpoint=tracker.refresh(candidate.checkpoint))
    protocol = protocol_of(config, candidate, extractor)
    if not lacking(config, candidate, extractor) and config.save_images is None:
        return _skipped(candidate, "another evaluator has measured it meanwhile")
    stands = standing(candidate.checkpoint, protocol.identity)
    if (obstacle := _obstacle(config, stands)) is not None:
        return _skipped(candidate, obstacle)
    lease = tracker.take_lease(candidate.checkpoint, protocol.identity, stands)
    if lease is None:
        return _skipped(candidate, "another evaluator took it at the same moment")
    with lease:
        try:
            return _evaluate_one(
                config, tracker, candidate, protocol, extractor, workers, lease, deadline, logged_under
            )
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
            return Failure(run=run, step=step, reason=str(error), unreachable=isinstance(error, UnreachableError))


def _evaluate_one(
    config: EvaluateConfig,
    tracker: Tracker,
    candidate: Candidate,
    protocol: Protocol,
    extractor: FeatureExtractor,
    workers: Workers,
    lease: Lease,
    deadline: Deadline,
    logged_under: str,
) -> Evaluation:
    started = time.monotonic()
    checkpoint, location = candidate.checkpoint, candidate.checkpoint.tags["data.location"]
    files, profile_error = fetch(candidate, tracker)
    model = Model(
        name=f"{checkpoint.run_name} step {checkpoint.step}",
        files=files,
        meta=files.read_meta(f"{checkpoint.run_name} step {checkpoint.step}"),
        images=images_location(config, candidate.name),
    )
    protocols = protocols_of(config, protocol, extractor)
    # Where nothing is lacking only the images are wanted; their metrics are not logged again.
    missing = lacking(config, candidate, extractor)
    wants_sheet = candidate.width is None and not tracker.has_sheet(checkpoint)
    found = measure(
        config,
        model,
        reference_of(location, model, digest=protocol.reference_digest),
        location,
        protocol=protocol,
        metrics=missing,
        extractor=extractor,
        workers=workers,
        after_chunk=partial(_after_chunk, lease, deadline),
        on_sheet=partial(tracker.log_sheet, checkpoint) if wants_sheet else None,
    )
    for metric, own in missing.items():
        record = {**own.to_record(), "code": _code()}
        if profile_error is not None:
            record["ema_profile_error"] = f"{profile_error:.2g}"
        if found.note:
            record["note"] = found.note
        lease.check()
        values = found.metrics[metric]
        tracker.log_result(
            checkpoint, identity=own.identity, protocol=record, metrics=values, logged_under=logged_under
        )
    if found.terms is not None:
        tracker.log_terms(checkpoint, found.terms, suffix=candidate.metric_suffix)
    found.discard()
    values = _stored(checkpoint, protocols)
    for metric in missing:
        values |= found.metrics[metric]
    evaluation = _evaluation(config, checkpoint, protocols, values, seconds=time.monotonic() - started)
    logger.info("%s: %s %.4f", model.name, evaluation.metric, evaluation.value)
    return replace(evaluation, images=model.images, note=found.note)


def _code() -> str:
    code = code_record()
    return code.get("git_commit", code["source_sha256"])


def _stored(checkpoint: Checkpoint, protocols: Mapping[str, Protocol]) -> dict[str, float]:
    """Values of the metrics whose results are there."""
    values: dict[str, float] = {}
    for protocol in protocols.values():
        if checkpoint.has_result(protocol.identity):
            values |= checkpoint.result(protocol.identity)["metrics"]
    return values


def _after_chunk(lease: Lease, deadline: Deadline) -> None:
    lease.advance()
    if lease.is_lost:
        lease.check()
    if deadline.is_over:
        raise OutOfTimeError


def _evaluation(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    protocols: Mapping[str, Protocol],
    values: Mapping[str, float],
    *,
    seconds: float,
) -> Evaluation:
    protocol = next(iter(protocols.values()))  # The first of --metrics stands for all in one line.
    return Evaluation(
        run=checkpoint.run_name,
        step=checkpoint.step,
        model_id=checkpoint.model_id,
        weights=protocol.weights,
        metric=protocol.metric,
        value=values[protocol.metric],
        metrics=values,
        num_images=config.protocol.num_images,
        identity=protocol.identity,
        seconds=seconds,
    )
