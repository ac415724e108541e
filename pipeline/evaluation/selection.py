"""Which checkpoints an evaluation is about, and which of them it cannot measure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.config import EvaluateConfig, TrainConfig, override, to_flat
from pipeline.data.manifest import MANIFEST_NAME
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, extractor_of
from pipeline.evaluation.metrics import metric_protocol
from pipeline.evaluation.outcome import Skipped
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.weights import Candidate, candidates
from pipeline.generation import check_sampling
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["fitting", "images_location", "lacking", "protocol_of", "protocols_of", "select", "selected"]


def select(config: EvaluateConfig, tracker: Tracker) -> list[Candidate]:
    """Weights of published checkpoints that ``config`` selects and that lack a result, newest first.

    Where images are to be saved, those without a finished data set of images count as well.

    Raises:
        UserError: Unknown experiment or run, a run without checkpoints or with too few snapshots for ``ema_width``,
            refused weights of the feature network.
    """
    extractor = extractor_of(config.protocol)
    found = selected(config, tracker)
    return [c for c in found if not _is_ours(c) or not _is_done(config, c, extractor)]


def fitting(
    config: EvaluateConfig, tracker: Tracker, todo: Sequence[Candidate]
) -> tuple[list[Candidate], list[Skipped]]:
    """Parts candidates into those that can be sampled as wanted, by what their run was trained with, and the others.

    Raises:
        UserError: The run that ``config`` names cannot be sampled so.
    """
    good: list[Candidate] = []
    bad: dict[str, Skipped] = {}
    reasons: dict[str, str | None] = {}
    for candidate in todo:
        run_id, run = candidate.checkpoint.run_id, candidate.checkpoint.run_name
        if run_id not in reasons:
            reasons[run_id] = _unfit(config, tracker.params(run_id))
        reason = reasons[run_id] if _is_ours(candidate) else "no training run of this project published it"
        if reason is None:
            good.append(candidate)
        elif config.run is not None:
            raise UserError(f"run {run!r}: {reason}")
        else:
            bad[run_id] = Skipped(run=run, step=None, reason=reason)
    return good, list(bad.values())


def selected(config: EvaluateConfig, tracker: Tracker) -> list[Candidate]:
    """What ``config`` selects, whether it has the result or not. Raises as ``select``."""
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


def protocol_of(config: EvaluateConfig, candidate: Candidate, extractor: FeatureExtractor) -> Protocol:
    """The protocol of a candidate's Frechet distance; its identity is also that of the images and of the lease."""
    digest = candidate.checkpoint.tags["data.digest"]
    return Protocol.of(config, extractor, digest, candidate.weights, candidate.metric_suffix)


def protocols_of(config: EvaluateConfig, distance: Protocol, extractor: FeatureExtractor) -> dict[str, Protocol]:
    """The protocol of each wanted metric, given that of the Frechet distance."""
    return {metric: metric_protocol(metric, distance, extractor, config) for metric in config.metrics}


def lacking(config: EvaluateConfig, candidate: Candidate, extractor: FeatureExtractor) -> dict[str, Protocol]:
    """The wanted metrics that a candidate has no result of, and their protocols."""
    wanted = protocols_of(config, protocol_of(config, candidate, extractor), extractor)
    return {metric: own for metric, own in wanted.items() if not candidate.checkpoint.has_result(own.identity)}


def images_location(config: EvaluateConfig, name: str) -> str | None:
    """Where the images of a model go; None if they are not wanted."""
    return storage.join(storage.resolve(config.save_images), name) if config.save_images is not None else None


def _is_done(config: EvaluateConfig, candidate: Candidate, extractor: FeatureExtractor) -> bool:
    if lacking(config, candidate, extractor):
        return False
    location = images_location(config, candidate.name)
    return location is None or storage.exists(storage.join(location, MANIFEST_NAME))


def _checkpoints_of_run(name: str, tracker: Tracker) -> list[Checkpoint]:
    run = tracker.find_run(name)
    if run is None:
        known = ", ".join(tracker.run_names()) or "none"
        raise UserError(f"no run is called {name!r}; the newest are: {known}")
    found = tracker.checkpoints(run.info.experiment_id, run_id=run.info.run_id)
    if not found:
        raise UserError(f"run {name!r} has no published checkpoint yet")
    return found


def _is_ours(candidate: Candidate) -> bool:
    return {"data.digest", "data.location"} <= candidate.checkpoint.tags.keys()


def _unfit(config: EvaluateConfig, params: Mapping[str, str]) -> str | None:
    """Why models of a run cannot be sampled as wanted."""
    trained = _trained(params)
    try:
        if trained is not None:
            check_sampling(config.sampling, trained)
    except UserError as error:
        return str(error)
    return None


def _trained(params: Mapping[str, str]) -> TrainConfig | None:
    """A run's config by its params; None if they are not those of a run of ours."""
    default = TrainConfig()
    known = {key: value for key, value in to_flat(default).items() if key in params and value is not None}
    try:
        return override(default, {key: _parsed(params[key], value) for key, value in known.items()})
    except (ValueError, TypeError, UserError):
        return None


def _parsed(text: str, default: Any) -> Any:
    """A param's value: strings are kept as they are, other values as JSON."""
    if isinstance(default, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text  # --num-workers 2:8, whose default is a number
