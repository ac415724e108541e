"""One trial: the project's own training, judged by the sweep's protocol; in between, if trials may be stopped early."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config import EvaluateConfig, TrainConfig
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.evaluator import evaluate_last
from pipeline.storage import UnreachableError
from pipeline.sweep.record import Ended
from pipeline.sweep.sampling_search import sample_otherwise
from pipeline.sweep.space import Trial
from pipeline.tracking import Tracker
from pipeline.training.trainer import fit

__all__ = ["ENDED", "GOES_ON", "OBJECTIVE", "STEP", "TrialPlan", "run_trial"]

logger = logging.getLogger(__name__)

ENDED, STEP, OBJECTIVE, GOES_ON = "ended", "step", "objective", "goes_on"
"""Keys of what a trial reports: how it ended, or the objective at a rung and whether it was let pass there before."""
_PREDECESSOR_SECONDS = 60.0
_OUTAGE_SECONDS = 900.0
"""How long a trial waits for MLflow: it restarts at night, and nobody is there to start the trial again."""
_MAX_OUTAGES, _FIRST_PAUSE_SECONDS = 5, 10.0
_NO_VALUE = 1e30
"""Of a failed trial, at step 0, where early stopping does not look: Tune wants a finite number in every report."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What all trials share."""

    sweep: str
    run_id: str
    """Of the sweep's run."""
    base: TrainConfig
    evaluation: EvaluateConfig
    rungs: Sequence[int]
    """Steps at which early stopping looks."""
    rung_images: int
    ways: Sequence[dict[str, Any]]
    """How else to sample the trained model."""


def run_trial(plan: TrialPlan, trial: Trial) -> Iterator[dict[str, Any]]:
    """Yields what is reported to Tune: the objective at each rung, then how the trial ended.

    Training pauses at a rung until Tune has decided, so a stopped trial takes no step more, and goes on from its
    checkpoint to the same bits. A server that is away is waited for. Failures are outcomes: the sweep notes them and
    goes on.
    """
    started = time.monotonic()
    rungs: dict[int, float] = {}
    outages = 0
    while True:
        try:
            tracker = Tracker(patience_seconds=_OUTAGE_SECONDS)
            _await_end_of_predecessor(f"{plan.sweep}-{trial.key}", tracker)
            reached = _reached(f"{plan.sweep}-{trial.key}", tracker)
            for step in plan.rungs:
                if step not in rungs:
                    rungs[step] = _at_rung(plan, trial, tracker, step)
                    yield {STEP: step, OBJECTIVE: rungs[step], GOES_ON: reached > step}
            ended = _to_the_end(plan, trial, tracker)
            break
        except UnreachableError as error:
            if (outages := outages + 1) > _MAX_OUTAGES:
                ended = _failed(error)
                break
            logger.warning("trial %s goes on when the server is back: %s", trial.key, error)
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (outages - 1))
        except (UserError, WorldError) as error:
            ended = _failed(error)
            break
    ended = replace(ended, rungs=rungs, seconds=time.monotonic() - started)
    yield {ENDED: asdict(ended), STEP: ended.step, OBJECTIVE: _NO_VALUE if ended.value is None else ended.value}


def _failed(error: Exception) -> Ended:
    return Ended(status="failed", error=" ".join(str(error).split()))


def _at_rung(plan: TrialPlan, trial: Trial, tracker: Tracker, step: int) -> float:
    config = trial.config(plan.base, plan.sweep)
    assert config.name is not None
    if step not in _published_steps(config.name, tracker):
        fit(config, tracker, parent_run_id=plan.run_id, tags=_tags(trial), until=step)
    protocol = replace(plan.evaluation.protocol, num_images=plan.rung_images)
    judged = replace(plan.evaluation, step=step, protocol=protocol)
    return evaluate_last(judged, config.name, tracker, logged_under="/rung").value


def _to_the_end(plan: TrialPlan, trial: Trial, tracker: Tracker) -> Ended:
    config = trial.config(plan.base, plan.sweep)
    assert config.name is not None
    trained = fit(config, tracker, parent_run_id=plan.run_id, tags=_tags(trial))
    result = evaluate_last(replace(plan.evaluation, step=config.steps), config.name, tracker)
    return Ended(
        status="finished",
        step=config.steps,
        value=result.value,
        identity=result.identity,
        run_id=trained.run_id,
        images_seen=config.steps * config.data.batch_size,
        images_per_second=trained.images_per_second,
        sampled=tuple(sample_otherwise(plan.evaluation, plan.ways, config, tracker)),
    )


def _await_end_of_predecessor(run: str, tracker: Tracker) -> None:
    """The process that had this trial in a sweep that was killed a moment ago may still be about to die."""
    deadline = time.monotonic() + _PREDECESSOR_SECONDS
    while tracker.is_held(run) and time.monotonic() < deadline:
        time.sleep(1.0)


def _reached(run: str, tracker: Tracker) -> int:
    """The step that the trial had reached in a sweep that was killed. Beyond a rung it was let pass there."""
    found = tracker.find_run(run)
    return 0 if found is None else tracker.last_step(found.info.run_id)


def _tags(trial: Trial) -> dict[str, str]:
    return {"ddpm.trial": trial.point.key, "ddpm.seed": str(trial.seed)}


def _published_steps(run: str, tracker: Tracker) -> set[int]:
    found = tracker.find_run(run)
    if found is None:
        return set()
    return {entry.step for entry in tracker.checkpoints(found.info.experiment_id, run_id=found.info.run_id)}
