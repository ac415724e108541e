"""The end of a sweep: its result, the best model's alias, and what is left on the sweep's run."""

import json
from dataclasses import asdict, replace

from pipeline import storage
from pipeline.config import TuneConfig
from pipeline.evaluation.protocol import Protocol
from pipeline.sweep.record import SweepRecord
from pipeline.sweep.report import SweepResult, TrialResult
from pipeline.sweep.report_html import sweep_report
from pipeline.sweep.space import Trial
from pipeline.tracking import TrackedRun, Tracker

__all__ = ["conclude", "write_report"]


def conclude(record: SweepRecord, protocol: Protocol, parent: TrackedRun, tracker: Tracker) -> SweepResult:
    """Works out who won, registers the model if that is wanted, and leaves all of it on the sweep's run.

    Args:
        record: The sweep's, with every trial ended.
        protocol: The one that all trials were judged by.
        parent: The sweep's run.
        tracker: Connected to MLflow.

    Raises:
        WorldError: MLflow is away.
    """
    config = record.config
    trials = [trial for point in record.points.values() for trial in point.trials(config)]
    result = SweepResult(
        name=record.name,
        run_id=parent.run_id,
        metric=protocol.metric,
        identity=protocol.identity,
        trials=[_trial_result(record, trial) for trial in trials if trial.key in record.ended],
        refused=list(record.refused.values()),
        ui=tracker.ui_command(parent.run_id, parent.experiment_id),
    )
    result = replace(result, registered=_register(config, result, tracker))
    _log(result, parent)
    return replace(result, report=write_report(result.name, parent, tracker))


def write_report(name: str, parent: TrackedRun | None, tracker: Tracker, *, run_id: str = "") -> str:
    """Writes a sweep's report, read from MLflow, under ``$DDPM_HOME/reports``.

    Args:
        name: The sweep's.
        parent: Its run, where the report is logged as well; None leaves MLflow as it is.
        tracker: Connected to MLflow.
        run_id: Of the sweep's run, where ``parent`` is None.

    Returns:
        Where it lies.
    """
    page = sweep_report(tracker, run_id if parent is None else parent.run_id, by_itself=parent is not None)
    location = storage.join(storage.home(), "reports", f"sweep-{name}.html")
    storage.write_bytes(location, page.encode())
    if parent is not None:
        parent.log_text(page, "sweep.html")
    return location


def _trial_result(record: SweepRecord, trial: Trial) -> TrialResult:
    ended, knobs = record.ended[trial.key], dict(trial.point.knobs)
    return TrialResult(
        run=f"{record.name}-{trial.key}",
        run_id=ended.run_id,
        point=trial.point.key,
        seed=trial.seed,
        status=ended.status,
        schedule=knobs.pop("schedule"),
        T=knobs.pop("T"),
        beta_start=knobs.pop("beta_start", None),
        beta_end=knobs.pop("beta_end", None),
        knobs=knobs,
        value=ended.value,
        step=ended.step,
        images_seen=ended.images_seen,
        images_per_second=ended.images_per_second,
        seconds=ended.seconds,
        error=ended.error,
        sampled=ended.sampled,
    )


def _register(config: TuneConfig, result: SweepResult, tracker: Tracker) -> str | None:
    winner = result.winner
    if config.register is None or winner is None:
        return None
    checkpoints = tracker.checkpoints(tracker.experiment(config.base.experiment, create=False), run_id=winner.run_id)
    best = max(checkpoints, key=lambda checkpoint: checkpoint.step)
    facts = {"sweep": result.name, "metric": result.metric, "value": f"{winner.value:.6g}"}
    version = tracker.crown(config.register, best, facts)
    return f"champion of {config.register}: version {version}, {best.run_name} step {best.step}"


def _log(result: SweepResult, parent: TrackedRun) -> None:
    """Leaves the answer on the sweep's run; reports that read MLflow come last, when all they read is there."""
    winner = result.winner
    # MLflow's page of the run begins with the note.
    note = f"{result.verdict()}\n\nAll of it: the artifact sweep.html."
    tags = {"ddpm.verdict": result.verdict(), "mlflow.note.content": note}
    parent.set_tags({**tags, **({"ddpm.winner": winner.run} if winner else {})})
    if winner is not None and winner.value is not None:
        parent.log_metrics([{"step": 0, result.metric: winner.value}])
    parent.log_text(json.dumps([asdict(entry) for entry in result.refused]), "refused.json")
    parent.log_text(result.text(), "sweep.txt")
    parent.log_text(result.to_csv(), "sweep.csv")
