"""The evaluate job: MLflow first, Ray only if there is something to do."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from pipeline import cluster
from pipeline.config import EvaluateConfig
from pipeline.errors import WorldError
from pipeline.evaluation.champion import crown
from pipeline.evaluation.compare import Comparison, compare
from pipeline.evaluation.evaluator import Deadline, evaluate, free
from pipeline.evaluation.features import extractor_of
from pipeline.evaluation.folder import evaluate_folder
from pipeline.evaluation.outcome import Evaluation, Outcome
from pipeline.evaluation.report import Written, write_report
from pipeline.evaluation.selection import fitting, select
from pipeline.tracking import Tracker

__all__ = ["evaluate_job"]

logger = logging.getLogger(__name__)


def evaluate_job(config: EvaluateConfig) -> Outcome | Written | Comparison:
    """Does what ``config`` asks for. Raises as ``evaluate``, ``evaluate_folder``, ``compare`` and ``write_report``."""
    if config.report is not None:
        return write_report(config)
    if config.compare:
        return compare(config.compare, Tracker())
    if config.checkpoint is not None:
        return evaluate_folder(config)
    return _watch(config) if config.watch else _once(config, Deadline.of(config))


def _once(
    config: EvaluateConfig, deadline: Deadline, on_result: Callable[[Evaluation], None] = lambda evaluation: None
) -> Outcome:
    tracker = Tracker()
    tracker.close_abandoned(config.experiment)
    extractor = extractor_of(config.protocol)
    fit, unfit = fitting(config, tracker, select(config, tracker))
    todo, taken = free(config, fit, extractor)
    outcome = Outcome()
    if todo and not deadline.is_over:  # a schedule fires often: without work it costs no cluster
        with cluster.connect(num_cpus=config.cluster.max_workers * config.cluster.cpus_per_worker):
            outcome = evaluate(config, tracker, todo, deadline, on_result=on_result)
    return replace(outcome, skipped=[*unfit, *taken, *outcome.skipped], champion=_champion(config, tracker))


def _champion(config: EvaluateConfig, tracker: Tracker) -> str | None:
    try:
        return crown(config, tracker)
    except WorldError as error:  # The results are safe; the next evaluation looks again.
        return f"the champion was not looked for: {error}"


def _watch(config: EvaluateConfig) -> Outcome:
    """Looks for pending checkpoints again and again, until Ctrl-C or the end of ``max_minutes``."""
    deadline, total = Deadline.of(config), Outcome()
    evaluated: list[Evaluation] = []
    try:
        while not deadline.is_over:
            try:
                total = _once(config, deadline, evaluated.append)
                logger.info("%s; looking again in %g s", total.text(), config.interval)
            except WorldError as error:  # A server that is away today may be back at the next look.
                logger.warning("%s; looking again in %g s", error, config.interval)
            time.sleep(max(0.0, min(config.interval, deadline.moment - time.monotonic())))
    except KeyboardInterrupt:
        logger.info("interrupted")
    return replace(total, evaluated=evaluated, failed=(), skipped=())
