"""Ray Tune over noise schedules: each trial trains with the project's own ``fit`` and is judged by one protocol.

Fair by construction: all trials share seed, image order, noise, initial weights, number of images seen, sampler and
number of network evaluations. The loss is never the objective: it is not comparable across schedules and T.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import ray.tune
from ray.tune import FailureConfig, RunConfig, Tuner
from ray.tune import TuneConfig as RayTuneConfig

from pipeline import cluster
from pipeline.config import EvaluateConfig, TuneConfig, as_params, changes, to_flat
from pipeline.diffusion.averages import EMA
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.features import extractor_of
from pipeline.evaluation.metrics import metric_protocol
from pipeline.evaluation.protocol import Protocol
from pipeline.provenance import code_record
from pipeline.sweep.bookkeeping import Bookkeeper, trial_of
from pipeline.sweep.conclusion import conclude
from pipeline.sweep.points import Listed, Source, open_source
from pipeline.sweep.record import SweepRecord, sweeps_root
from pipeline.sweep.report import SweepResult
from pipeline.sweep.sampling_search import ways_to_sample
from pipeline.sweep.searcher import TrialSearcher, rungs_of, stopping
from pipeline.sweep.trial_run import TrialPlan, run_trial
from pipeline.tracking import TrackedRun, Tracker
from pipeline.training.task import TrainingTask, plan

__all__ = ["tune"]

logger = logging.getLogger(__name__)

# What may differ when a sweep is continued: which trials it has and where they run, not their budget or protocol.
_MAY_CHANGE = {
    "schedules",
    "Ts",
    "beta_ranges",
    "search",
    "algorithm",
    "num_trials",
    "seeds",
    "sampling_search",
    "register",
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
_NO_END = 10**9


def tune(config: TuneConfig, name: str, tracker: Tracker) -> SweepResult:
    """Runs a sweep, or continues the one of this name: trials that have ended are not trained or measured again.

    Starts Ray if no cluster is given and there is a trial to run.

    Args:
        config: Space, base run and protocol.
        name: The sweep's name.
        tracker: Connected to MLflow.

    Raises:
        UserError: No sound combination, or data set, config or name is refused; nothing was started.
        WorldError: No trial finished.
    """
    record = SweepRecord.load(name) or SweepRecord(name=name, config=config)
    record.config = config
    source = _open_source(config, record)
    task = _check_trials(source, config, name)
    protocol = _protocol(config, task)
    _refuse_another_sweep(config, name, tracker)
    parent = tracker.start_run(
        name, experiment=config.base.experiment, params=_params(config), tags=_tags(config, protocol)
    )
    with _truthful_status(parent, tracker):
        record.save()
        plan_of_all = TrialPlan(
            sweep=name,
            run_id=parent.run_id,
            base=config.base,
            evaluation=_evaluation(config),
            rungs=rungs_of(config),
            rung_images=config.rung_images,
            ways=ways_to_sample(config),
        )
        bookkeeper = Bookkeeper(config, record, source, tracker, parent)
        _run(plan_of_all, config, record, source, bookkeeper)
        bookkeeper.send()
        result = conclude(record, protocol, parent, tracker)
        if result.winner is None:
            raise WorldError(f"no trial finished; the first error: {result.trials[0].error}")
    return result


def _open_source(config: TuneConfig, record: SweepRecord) -> Source:
    points = record.points.values()
    known = [(point, record.value_of(point, config), record.is_done(point, config)) for point in points]
    return open_source(config, known)


def _check_trials(source: Source, config: TuneConfig, name: str) -> TrainingTask:
    """Checks data set and network of all trials that are known by now; Optuna's later points at least their network."""
    ways_to_sample(config)
    rungs_of(config)
    trials = [trial for point in source.points for trial in point.trials(config)] if isinstance(source, Listed) else []
    for trial in trials:
        plan(trial.config(config.base, name))
    return plan(replace(config.base, name=name))


def _evaluation(config: TuneConfig) -> EvaluateConfig:
    evaluation = EvaluateConfig.after(config.base, config.protocol)
    return replace(evaluation, metrics=(config.objective,), held_out=config.held_out)  # type: ignore[arg-type]


def _protocol(config: TuneConfig, task: TrainingTask) -> Protocol:
    """The protocol that all trials are judged by. Raises ``UserError`` if the feature network is refused."""
    evaluation, extractor = _evaluation(config), extractor_of(config.protocol)
    distance = Protocol.of(evaluation, extractor, task.manifest.digest, EMA)
    return metric_protocol(config.objective, distance, extractor, evaluation)


def _refuse_another_sweep(config: TuneConfig, name: str, tracker: Tracker) -> None:
    """A sweep may be continued with more trials, but all of them must have had the same budget and protocol."""
    existing = tracker.find_run(name)
    if existing is None:
        return
    if existing.data.tags.get("ddpm.kind") != "sweep":
        raise UserError(f"{name!r} is a training run; choose another --name for the sweep")
    changed = changes(as_params(_params(config)), existing.data.params, allowed=_MAY_CHANGE)
    if changed:
        raise UserError(f"sweep {name!r} exists with other trials: {'; '.join(changed)}; choose another --name")


def _params(config: TuneConfig) -> dict[str, Any]:
    searched = {"schedule", "T", "beta_start", "beta_end", "name", "report", "restore"}
    return {key: value for key, value in to_flat(config).items() if key not in searched}


def _tags(config: TuneConfig, protocol: Protocol) -> dict[str, str]:
    return {
        "ddpm.kind": "sweep",
        "ddpm.objective": protocol.metric,
        "ddpm.protocol": protocol.identity,
        "ddpm.budget": f"{config.base.steps} steps of {config.base.data.batch_size} images",
        **{f"code.{key}": value for key, value in code_record().items()},
    }


@contextmanager
def _truthful_status(parent: TrackedRun, tracker: Tracker) -> Iterator[None]:
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        logger.info("the sweep goes on with: python jobs/tune.py --restore %s", parent.name)
        raise
    finally:
        # That MLflow is away must not hide how the sweep ended; later jobs mark what is left.
        try:
            # Trials that were stopped with the sweep cannot say so themselves.
            tracker.end_children(parent.run_id, parent.experiment_id)
            parent.finish(status)
        except WorldError as error:
            logger.warning("the sweep could not be marked %s: %s", status, error)


def _concurrency(config: TuneConfig) -> int:
    """As many trials as the cluster holds workers for, unless the caller knows better (a cluster that grows)."""
    workers = config.base.cluster
    fitting = cluster.fits(
        num_workers=workers.min_workers, cpus_per_worker=workers.cpus_per_worker, use_gpu=workers.use_gpu
    )
    wanted = config.max_concurrent_trials or fitting
    if wanted > fitting and "RAY_ADDRESS" not in os.environ:
        logger.warning("--max-concurrent-trials %d: this machine holds the workers of %d", wanted, max(1, fitting))
        wanted = fitting
    return max(1, wanted)


def _run(
    plan_of_all: TrialPlan, config: TuneConfig, record: SweepRecord, source: Source, bookkeeper: Bookkeeper
) -> None:
    searcher = TrialSearcher(config, record, source)
    if not searcher.has_work():
        return
    listed = f" of {len(source.points) * config.seeds}" if isinstance(source, Listed) else ""
    logger.info(
        "sweep %s: %d%s trials have ended, %d combinations refused",
        record.name, len(record.ended), listed, len(record.refused),
    )  # fmt: skip

    def trainable(task: dict[str, str]) -> None:
        for report in run_trial(plan_of_all, trial_of(task)):
            ray.tune.report(report)

    # Ctrl-C ends the sweep at once: what has ended is on record, and --restore goes on.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    workers = config.base.cluster
    with cluster.connect(num_cpus=workers.max_workers * workers.cpus_per_worker):
        tuner = Tuner(
            ray.tune.with_resources(trainable, _DRIVER_RESOURCES),
            tune_config=RayTuneConfig(
                search_alg=searcher,
                scheduler=stopping(config, record),
                num_samples=_NO_END,
                max_concurrent_trials=_concurrency(config),
                trial_dirname_creator=lambda trial: f"{trial.config['trial'][:100]}-{trial.trial_id}",
            ),
            run_config=RunConfig(
                name=record.name,
                storage_path=sweeps_root(),
                callbacks=[bookkeeper],
                # Of a trial's driver, whose node may be taken away; what training itself says is reported, not raised.
                failure_config=FailureConfig(max_failures=config.base.cluster.max_failures),
                verbose=0,
            ),
        )
        tuner.fit()
