"""The evaluate job: MLflow first, Ray only if there is something to do."""

from pipeline import cluster
from pipeline.config import EvaluateConfig
from pipeline.evaluation.evaluator import Outcome, evaluate, select
from pipeline.tracking import Tracker

__all__ = ["evaluate_job"]


def evaluate_job(config: EvaluateConfig) -> Outcome:
    """Evaluates what ``config`` selects. Raises as ``evaluate``."""
    tracker = Tracker()
    tracker.close_abandoned(config.experiment)
    todo = select(config, tracker)
    if not todo:
        return Outcome()  # a schedule fires often: this costs no cluster
    with cluster.connect(num_cpus=config.cluster.max_workers * config.cluster.cpus_per_worker):
        return evaluate(config, tracker, todo)
