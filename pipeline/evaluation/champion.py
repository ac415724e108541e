"""The best model of an experiment gets the alias ``champion`` in the model registry."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.evaluation.features import FeatureExtractor, extractor_of
from pipeline.evaluation.frechet import NORMAL_95
from pipeline.evaluation.metrics import metric_protocol
from pipeline.evaluation.protocol import Protocol, differences
from pipeline.evaluation.selection import protocol_of
from pipeline.evaluation.weights import Candidate
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["Scored", "crown", "is_clearly_better", "registered_name"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A checkpoint's result by one protocol."""

    checkpoint: Checkpoint
    value: float
    standard_error: float | None
    """As ``fd-interval`` gave it; None if that was not measured."""

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.checkpoint.run_name} step {self.checkpoint.step}"


def crown(config: EvaluateConfig, tracker: Tracker) -> str | None:
    """Gives the alias to the best model by the protocol of ``config``, if it is clearly better than the present one.

    Only results of one protocol are compared: while the champion lacks this protocol's result, it stays. Averages put
    together with ``ema_width`` are not published, so they cannot become champion.

    Returns:
        What happened, in words; None if nothing did.

    Raises:
        WorldError: MLflow is away.
    """
    if config.ema_width is not None:
        return None
    experiment = tracker.experiment_of(config.run) if config.run is not None else config.experiment
    if experiment is None:
        return None
    checkpoints = tracker.checkpoints(tracker.experiment(experiment, create=False))
    name = registered_name(config, experiment)
    present = tracker.champion(name)
    scored = _scored(config, checkpoints, present)
    if not scored:
        return None
    best, old = min(scored.values(), key=lambda entry: entry.value), scored.get(present or "")
    if present is not None and old is None:
        _say_why_not(config, checkpoints, present, name)
        return None
    if old is not None and not is_clearly_better(best, old, margin=config.champion_margin):
        return None
    version = tracker.crown(name, best.checkpoint, tags={"metric": _metric(config), "value": f"{best.value:.6g}"})
    before = "" if old is None else f", before {old.name} with {old.value:.4f}"
    return f"champion of {name}: version {version}, {best.name} with {_metric(config)} {best.value:.4f}{before}"


def is_clearly_better(new: Scored, old: Scored, *, margin: float) -> bool:
    """Whether a distance is smaller by more than its uncertainty.

    Where both standard errors are known that is the 95 % interval of the difference, as of independent draws of the
    images; elsewhere a part ``margin`` of the old distance.
    """
    if new.standard_error is None or old.standard_error is None:
        return new.value < old.value * (1 - margin)
    return old.value - new.value > NORMAL_95 * math.hypot(new.standard_error, old.standard_error)


def registered_name(config: EvaluateConfig, experiment: str) -> str:
    """The registered model's name; MLflow allows neither slashes nor colons in it."""
    return config.register or experiment.replace("/", "-").replace(":", "-")


def _scored(config: EvaluateConfig, checkpoints: Sequence[Checkpoint], present: str | None) -> Mapping[str, Scored]:
    """Results of one protocol: the champion's, else that of the newest checkpoint that has one."""
    extractor = extractor_of(config.protocol)
    by_identity: dict[str, dict[str, Scored]] = {}
    for checkpoint in checkpoints:
        if "data.digest" not in checkpoint.tags:
            continue
        protocol = protocol_of(config, Candidate(checkpoint=checkpoint), extractor)
        if checkpoint.has_result(protocol.identity):
            scored = Scored(
                checkpoint=checkpoint,
                value=checkpoint.result(protocol.identity)["metrics"][protocol.metric],
                standard_error=_standard_error(config, checkpoint, protocol, extractor),
            )
            by_identity.setdefault(protocol.identity, {})[checkpoint.model_id] = scored
    groups = list(by_identity.values())
    return next((group for group in groups if present in group), groups[0] if groups else {})


def _standard_error(
    config: EvaluateConfig, checkpoint: Checkpoint, distance: Protocol, extractor: FeatureExtractor
) -> float | None:
    interval = metric_protocol("fd-interval", distance, extractor, config)
    if not checkpoint.has_result(interval.identity):
        return None
    return float(checkpoint.result(interval.identity)["metrics"][f"{distance.metric}_stderr"])


def _say_why_not(config: EvaluateConfig, checkpoints: Sequence[Checkpoint], present: str, name: str) -> None:
    """Names what differs between the champion's protocol and the wanted one."""
    champion = next((entry for entry in checkpoints if entry.model_id == present), None)
    if champion is None:
        logger.info("the champion of %s is no checkpoint of this experiment; it stays", name)
        return
    extractor = extractor_of(config.protocol)
    wanted = protocol_of(config, Candidate(checkpoint=champion), extractor).to_record()
    known: list[Mapping[str, Any]] = [result["protocol"] for result in champion.results().values()]
    nearest = min((differences(record, wanted) for record in known), key=len, default=["it has no result"])
    logger.info("the champion of %s has no result of this protocol and stays: %s", name, "; ".join(nearest))


def _metric(config: EvaluateConfig) -> str:
    return extractor_of(config.protocol).metric
