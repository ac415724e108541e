"""The best model of an experiment gets the alias ``champion`` in the model registry."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.evaluation.features import extractor_of
from pipeline.evaluation.protocol import differences
from pipeline.evaluation.selection import protocol_of
from pipeline.evaluation.weights import Candidate
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["crown", "is_clearly_better", "registered_name"]

logger = logging.getLogger(__name__)

Scored = Mapping[str, tuple[float, Checkpoint]]
"""Distance and checkpoint by model id, of one protocol."""


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
    (value, best), old = min(scored.values(), key=lambda entry: entry[0]), scored.get(present or "")
    if present is not None and old is None:
        _say_why_not(config, checkpoints, present, name)
        return None
    if old is not None and not is_clearly_better(value, old[0], margin=config.champion_margin):
        return None
    version = tracker.crown(name, best, tags={"metric": _metric(config), "value": f"{value:.6g}"})
    before = "" if old is None else f", before {old[1].run_name} step {old[1].step} with {old[0]:.4f}"
    words = f"{best.run_name} step {best.step} with {_metric(config)} {value:.4f}{before}"
    return f"champion of {name}: version {version}, {words}"


def is_clearly_better(new: float, old: float, *, margin: float) -> bool:
    """Whether a distance is smaller by more than its uncertainty, a part ``margin`` of the old one."""
    return new < old * (1 - margin)


def registered_name(config: EvaluateConfig, experiment: str) -> str:
    """The registered model's name; MLflow allows neither slashes nor colons in it."""
    return config.register or experiment.replace("/", "-").replace(":", "-")


def _scored(config: EvaluateConfig, checkpoints: Sequence[Checkpoint], present: str | None) -> Scored:
    """Results of one protocol: the champion's, else that of the newest checkpoint that has one."""
    extractor = extractor_of(config.protocol)
    by_identity: dict[str, dict[str, tuple[float, Checkpoint]]] = {}
    for checkpoint in checkpoints:
        if "data.digest" not in checkpoint.tags:
            continue
        protocol = protocol_of(config, Candidate(checkpoint=checkpoint), extractor)
        if checkpoint.has_result(protocol.identity):
            value = checkpoint.result(protocol.identity)["metrics"][protocol.metric]
            by_identity.setdefault(protocol.identity, {})[checkpoint.model_id] = (value, checkpoint)
    groups = list(by_identity.values())
    return next((group for group in groups if present in group), groups[0] if groups else {})


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
