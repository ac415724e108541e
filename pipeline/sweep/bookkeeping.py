"""The sweep's driver while trials run: each end is written down, on disk at once, in MLflow once that answers."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ray.tune import Callback

from pipeline.config import TuneConfig
from pipeline.errors import first_line
from pipeline.sweep.points import Source
from pipeline.sweep.record import Ended, SweepRecord, ended_of
from pipeline.sweep.space import Point, Trial
from pipeline.sweep.trial_run import ENDED, OBJECTIVE, STEP
from pipeline.tracking import TakenOverError, TrackedRun, Tracker

__all__ = ["Bookkeeper", "task_of", "trial_of"]

logger = logging.getLogger(__name__)


def task_of(trial: Trial) -> dict[str, str]:
    """A trial as Tune's config."""
    return {"trial": trial.key, "task": json.dumps(asdict(trial))}


def trial_of(task: Mapping[str, Any]) -> Trial:
    """The inverse of ``task_of``."""
    record = json.loads(task["task"])
    return Trial(point=Point.of(record["point"]), seed=record["seed"], is_first=record["is_first"])


class Bookkeeper(Callback):
    """Tune tells it what happens; the only writer of the sweep's record and of notes on trials' runs."""

    def __init__(
        self, config: TuneConfig, record: SweepRecord, source: Source, tracker: Tracker, parent: TrackedRun
    ) -> None:
        self._config, self._record, self._source = config, record, source
        self._tracker, self._parent = tracker, parent
        self._rungs: dict[str, dict[int, float]] = {}
        self._unsent: dict[str, Trial] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune after each turn of its loop: a sign of life."""
        self._patiently(self._parent.heartbeat)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Tune when a trial reports."""
        own = trial_of(trial.config)
        if ENDED in result:
            self._end(own, ended_of(result[ENDED]))
        elif OBJECTIVE in result:
            self._rungs.setdefault(own.key, {})[int(result[STEP])] = float(result[OBJECTIVE])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when a trial is over; one that has not said how was stopped."""
        own = trial_of(trial.config)
        if own.key not in self._record.ended:
            rungs = self._rungs.get(own.key, {})
            step = max(rungs, default=0)
            images = step * self._config.base.data.batch_size
            seconds = (trial.last_result or {}).get("time_total_s")
            self._end(own, Ended(status="stopped", step=step, rungs=rungs, seconds=seconds, images_seen=images))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when a trial's process has died or raised what nobody expected."""
        own = trial_of(trial.config)
        lines = str(trial.get_error() or "its process died").strip().splitlines()
        self._end(
            own, Ended(status="failed", error=first_line(Exception(lines[-1])), rungs=self._rungs.get(own.key, {}))
        )

    def send(self) -> None:
        """Writes notes on trials' runs that MLflow has not taken yet. Raises ``WorldError`` if it does not now."""
        for key, trial in list(self._unsent.items()):
            self._note(trial, self._record.ended[key])
            del self._unsent[key]

    def _end(self, trial: Trial, ended: Ended) -> None:
        self._record.ended[trial.key] = ended
        self._record.save()
        self._unsent[trial.key] = trial
        self._patiently(self.send)
        words = {
            "finished": f"{ended.value}",
            "stopped": f"stopped at step {ended.step}",
            "failed": f"failed: {ended.error}",
        }
        logger.info("trial %d (%s): %s", len(self._record.ended), trial.key, words[ended.status])
        if self._record.is_done(trial.point, self._config):
            self._source.tell(trial.point.key, self._record.value_of(trial.point, self._config))

    def _note(self, trial: Trial, ended: Ended) -> None:
        run = self._tracker.find_run(f"{self._record.name}-{trial.key}")
        if run is None:
            return  # it failed before it had one
        if not ended.run_id:
            ended = self._record.ended[trial.key] = replace(ended, run_id=run.info.run_id)
            self._record.save()
        status = {"finished": None, "stopped": "KILLED", "failed": "FAILED"}[ended.status]
        tags = {"ddpm.trial": trial.point.key, "ddpm.seed": str(trial.seed), "ddpm.trial_status": ended.status}
        metrics = {"sweep/images_seen": float(ended.images_seen)}
        if ended.seconds is not None:
            metrics["sweep/seconds"] = ended.seconds
        self._tracker.note_trial(
            run.info.run_id,
            tags=tags | ({"ddpm.error": ended.error[:5000]} if ended.error else {}),
            metrics=metrics,
            step=ended.step,
            files={"sampling_search.json": json.dumps([asdict(one) for one in ended.sampled])} if ended.sampled else {},
            status=status,  # type: ignore[arg-type]
        )

    def _patiently(self, call: Any) -> None:
        """MLflow being away must not end a sweep; what it has not taken is sent later."""
        try:
            call()
        except TakenOverError:
            raise
        except Exception as error:  # MLflow lets through whatever its store raises.
            logger.warning("MLflow does not answer: %s", first_line(error))
