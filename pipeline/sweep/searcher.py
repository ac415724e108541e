"""The seam to Ray Tune's search and stopping: which trial comes next, and which goes on beyond a rung."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.config import TuneConfig
from pipeline.errors import UserError
from pipeline.sweep.bookkeeping import task_of
from pipeline.sweep.points import Source
from pipeline.sweep.record import SweepRecord
from pipeline.sweep.space import Trial
from pipeline.sweep.trial_run import GOES_ON, OBJECTIVE, STEP

__all__ = ["TrialSearcher", "rungs_of", "stopping"]


class TrialSearcher(Searcher):
    """Gives Tune the trials that have not ended, and writes down each point before its first trial starts."""

    def __init__(self, config: TuneConfig, record: SweepRecord, source: Source) -> None:
        super().__init__()
        self._config, self._record, self._source = config, record, source
        self._waiting: list[Trial] = []

    def has_work(self) -> bool:
        """Whether there is a trial to run."""
        while not self._waiting:
            if (point := self._source.next()) is None:
                return False
            self._record.points.setdefault(point.key, point)
            self._record.refused |= self._source.refused
            self._record.save()
            self._waiting = [trial for trial in point.trials(self._config) if trial.key not in self._record.ended]
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial as Tune's config."""
        return task_of(self._waiting.pop(0)) if self.has_work() else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune's; ends are written down by the bookkeeper, which is told more."""

    def save(self, checkpoint_path: str) -> None:
        """Tune's own copy of the state is not used: the sweep's record has it all."""
        Path(checkpoint_path).write_text("{}")

    def restore(self, checkpoint_path: str) -> None:
        """As ``save``."""


def rungs_of(config: TuneConfig) -> tuple[int, ...]:
    """The steps at which early stopping looks: ``first_rung`` and so many times that, below the last step.

    Raises:
        UserError: There is none, or it has no checkpoint.
    """
    if not config.early_stopping:
        return ()
    every, last = config.base.checkpoint_every, config.base.steps
    first = every if config.first_rung is None else config.first_rung
    if first < 1 or first % every:
        raise UserError(f"--first-rung {first}: must be a multiple of --checkpoint-every {every}")
    rungs = []
    while first < last:
        rungs.append(first)
        first *= config.reduction_factor
    if not rungs:
        raise UserError(
            f"--early-stopping: the first rung, step {first}, is not before the last of {last} steps; "
            "give a smaller --checkpoint-every or --first-rung"
        )
    return tuple(rungs)


class _Stopping(ASHAScheduler):
    """Ray's ASHA, which asks a trial only once at each rung.

    A killed sweep may have let a trial pass that others, which reported in another order this time, would now stop.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(GOES_ON) else decision


def stopping(config: TuneConfig, record: SweepRecord) -> TrialScheduler:
    """Ray's ASHA, told again what earlier trials of the sweep were worth at the rungs; or nobody is stopped."""
    rungs = rungs_of(config)
    if not rungs:
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    scheduler = _Stopping(
        time_attr=STEP,
        metric=OBJECTIVE,
        mode="min",
        max_t=config.base.steps,
        grace_period=rungs[0],
        reduction_factor=config.reduction_factor,
    )
    for key, ended in record.ended.items():
        earlier: Any = SimpleNamespace(trial_id=key)
        scheduler.on_trial_add(None, earlier)  # type: ignore[arg-type]
        for step, value in sorted(ended.rungs.items()):
            scheduler.on_trial_result(None, earlier, {STEP: step, OBJECTIVE: value})
    return scheduler
