"""Ray Tune over noise schedules: each trial trains with the project's own ``fit`` and is judged by one protocol.

Fair by construction: all trials share seed, image order, noise, initial weights, number of images seen, sampler and
number of network evaluations. The loss is never the objective: it is not comparable across schedules and T.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.tune
from ray.tune import Callback, RunConfig, Tuner
from ray.tune import TuneConfig as RayTuneConfig

from pipeline import cluster, storage
from pipeline.config import ClusterConfig, EvaluateConfig, TrainConfig, TuneConfig, as_params, changes, to_flat
from pipeline.errors import UserError, WorldError, first_line
from pipeline.evaluation.evaluator import evaluate_last
from pipeline.evaluation.features import extractor_of, metric_of
from pipeline.provenance import code_record
from pipeline.sweep.report import SweepResult, TrialResult
from pipeline.sweep.space import Trial, search_space
from pipeline.tracking import TakenOverError, TrackedRun, Tracker
from pipeline.training.task import plan
from pipeline.training.trainer import fit

__all__ = ["tune"]

logger = logging.getLogger(__name__)

# What may differ when a sweep is continued: which trials it has and where they run, not their budget or protocol.
_MAY_CHANGE = {
    "schedules",
    "Ts",
    "beta_ranges",
    "max_concurrent_trials",
    "num_workers",
    "use_gpu",
    "cpus_per_worker",
    "max_failures",
    "loader_cache_bytes",
    "keep_checkpoints",
    "log_every",
}

# A trial's driver only waits for its workers. It may hold no CPU: on a cluster that is full of such drivers no worker
# would ever start. Tune refuses a trial without any resource, so it holds one byte of memory.
_DRIVER_RESOURCES = {"CPU": 0.0, "memory": 1.0}


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """What every trial needs to know."""

    name: str
    run_id: str
    base: TrainConfig
    evaluation: EvaluateConfig
    trials: dict[str, Trial]


def tune(config: TuneConfig, name: str, tracker: Tracker) -> SweepResult:
    """Runs a sweep, or continues the one of this name: finished trials are not trained or measured again.

    Args:
        config: Space, base run and protocol.
        name: The sweep's name.
        tracker: Connected to MLflow.

    Raises:
        UserError: No sound combination, or data set, config or name is refused; nothing was started.
        WorldError: No trial finished.
    """
    trials, refused = search_space(config)
    for trial in trials:
        plan(trial.config(config.base, name))
    extractor_of(config.protocol)
    _refuse_another_sweep(config, name, tracker)
    workers = config.base.cluster
    parent = tracker.start_run(
        name,
        experiment=config.base.experiment,
        params=_params(config),
        tags={"ddpm.kind": "sweep", **{f"code.{key}": value for key, value in code_record().items()}},
    )
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        sweep = _Sweep(
            name=name,
            run_id=parent.run_id,
            base=config.base,
            evaluation=EvaluateConfig.after(config.base, config.protocol),
            trials={trial.key: trial for trial in trials},
        )
        logger.info("sweep %s: %d trials, %d combinations refused", name, len(trials), len(refused))
        results = _run(sweep, _concurrency(config, workers), parent)
        result = SweepResult(
            name=name,
            run_id=parent.run_id,
            metric=metric_of(config.protocol.features),
            identity=next((identity for _, identity in results if identity), ""),
            trials=[trial for trial, _ in results],
            refused=refused,
            ui=tracker.ui_command(parent.run_id, parent.experiment_id),
        )
        _log(result, parent)
        if result.winner is None:
            raise WorldError(f"no trial finished; the first error: {result.trials[0].error}")
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _end(tracker, parent, status)


def _end(tracker: Tracker, parent: TrackedRun, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Ends the sweep's runs. That MLflow is away must not hide how the sweep ended; later jobs mark what is left."""
    try:
        # Trials that were stopped with the sweep cannot say so themselves.
        tracker.end_children(parent.run_id, parent.experiment_id)
        parent.finish(status)
    except WorldError as error:
        logger.warning("the sweep could not be marked %s: %s", status, error)


def _refuse_another_sweep(config: TuneConfig, name: str, tracker: Tracker) -> None:
    """A sweep may be continued with more trials, but all of them must have had the same budget and protocol."""
    existing = tracker.find_run(name)
    if existing is None:
        return
    changed = changes(as_params(_params(config)), existing.data.params, allowed=_MAY_CHANGE)
    if changed:
        raise UserError(f"sweep {name!r} exists with other trials: {'; '.join(changed)}; choose another --name")


def _params(config: TuneConfig) -> dict[str, Any]:
    searched = {"schedule", "T", "beta_start", "beta_end", "name"}
    flat = to_flat(config)
    return {key: value for key, value in flat.items() if key not in searched}


def _concurrency(config: TuneConfig, workers: ClusterConfig) -> int:
    """As many trials as the cluster holds workers for, unless the caller knows better (a cluster that grows)."""
    fitting = cluster.fits(
        num_workers=workers.min_workers, cpus_per_worker=workers.cpus_per_worker, use_gpu=workers.use_gpu
    )
    return max(1, config.max_concurrent_trials or fitting)


def _run(sweep: _Sweep, concurrency: int, parent: TrackedRun) -> list[tuple[TrialResult, str]]:
    def run_trial(point: dict[str, str]) -> None:
        ray.tune.report(_train_and_evaluate(sweep, point["trial"]))

    tuner = Tuner(
        ray.tune.with_resources(run_trial, _DRIVER_RESOURCES),
        param_space={"trial": ray.tune.grid_search(list(sweep.trials))},
        tune_config=RayTuneConfig(max_concurrent_trials=concurrency),
        run_config=RunConfig(
            name=sweep.name,
            storage_path=storage.join(storage.home(), "sweeps"),
            callbacks=[_Progress(len(sweep.trials), parent)],
            verbose=0,
        ),
    )
    grid = tuner.fit()
    results = []
    for result in (grid[index] for index in range(len(grid))):
        trial = sweep.trials[(result.config or {})["trial"]]
        metrics = result.metrics or {}
        error = _last_line(result.error) if result.error else metrics.get("error")
        results.append((_trial_result(sweep, trial, metrics, error), str(metrics.get("identity", ""))))
    return results


def _train_and_evaluate(sweep: _Sweep, key: str) -> dict[str, Any]:
    """Runs in the trial's process, on the controller's side: it writes the child run."""
    started = time.monotonic()
    try:
        return _measure(sweep, key) | {"seconds": time.monotonic() - started}
    except (UserError, WorldError) as error:
        # An outcome, not a crash: the sweep records it and goes on.
        return {"error": str(error), "seconds": time.monotonic() - started}


def _measure(sweep: _Sweep, key: str) -> dict[str, Any]:
    tracker = Tracker()
    config = sweep.trials[key].config(sweep.base, sweep.name)
    assert config.name is not None
    trained = fit(config, tracker, parent_run_id=sweep.run_id, tags={"ddpm.trial": key})
    evaluation = evaluate_last(sweep.evaluation, config.name, tracker)
    return {
        "value": evaluation.value,
        "identity": evaluation.identity,
        "images_per_second": trained.images_per_second,
    }


def _trial_result(sweep: _Sweep, trial: Trial, metrics: dict[str, Any], error: str | None) -> TrialResult:
    return TrialResult(
        run=f"{sweep.name}-{trial.key}",
        schedule=trial.knobs["schedule"],
        T=trial.knobs["T"],
        beta_start=trial.knobs.get("beta_start"),
        beta_end=trial.knobs.get("beta_end"),
        value=None if error else metrics.get("value"),
        images_per_second=metrics.get("images_per_second"),
        seconds=metrics.get("seconds"),
        error=error,
    )


def _log(result: SweepResult, parent: TrackedRun) -> None:
    parent.log_text(result.to_csv(), "sweep.csv")
    parent.log_text(result.text(), "sweep.txt")
    winner = result.winner
    if winner is not None and winner.value is not None:
        parent.log_metrics([{"step": 0, result.metric: winner.value}])
        parent.set_tags({"ddpm.winner": winner.run, "ddpm.verdict": result.verdict(), "ddpm.protocol": result.identity})


def _last_line(error: BaseException) -> str:
    return first_line(Exception(str(error).strip().splitlines()[-1]))


class _Progress(Callback):
    """One line for each finished trial, and the sweep's sign of life."""

    def __init__(self, total: int, parent: TrackedRun) -> None:
        self._total, self._done, self._parent = total, 0, parent

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune after each turn of its loop."""
        try:
            self._parent.heartbeat()
        except TakenOverError:
            raise
        except Exception as error:  # MLflow being away must not end a sweep.
            logger.warning("MLflow does not answer: %s", first_line(error))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when a trial is done."""
        self._done += 1
        last = trial.last_result or {}
        outcome = f"{last['value']:.3f}" if "value" in last else f"failed: {last.get('error')}"
        logger.info("trial %d/%d %s: %s", self._done, self._total, trial.config["trial"], outcome)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when a trial has failed."""
        self._done += 1
        logger.warning("trial %d/%d %s failed", self._done, self._total, trial.config["trial"])
