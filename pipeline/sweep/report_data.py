"""Reads from MLflow what a report on a sweep shows."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.images import shrink_png
from pipeline.sweep.answer import BETAS, FIRST, SampledResult, SeedRun, Sheet, Status, SweepReport, TrialReport
from pipeline.sweep.report_commands import commands
from pipeline.tracking import RecordedRun, Tracker

__all__ = ["collect"]

CSV_FILE, REFUSED_FILE, SAMPLING_FILE = "sweep.csv", "refused.json", "sampling_search.json"
"""Artifacts: of the parent, the parent, and of each trial."""

_MOST_COMPARED = 50
"""Runs in the address of MLflow's page that compares them, which grows with each."""
_SHEET_SIDE = 1024
"""Sample sheets are shrunk to this width, pixels: a page of many megabytes is not read."""
_BY_STATUS: dict[str, Status] = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}
_STATUSES: tuple[Status, ...] = ("finished", "stopped", "failed", "running")

# What may differ between trials without being searched: where and how they ran.
_NOT_SEARCHED = {
    "name", "seed", "experiment", "preset", "num_workers", "use_gpu", "cpus_per_worker", "max_failures",
    "resize_seconds", "worker_timeout_seconds", "loader_cache_bytes", "keep_checkpoints", "log_every", "audit_dir",
    "quality_images", "quality_gpus", "grid_images", "cache_dir", "cache_bytes", "storage_patience_seconds",
}  # fmt: skip
_COSINE_ONLY = ("cosine_s", "max_beta")


def collect(tracker: Tracker, parent_run_id: str) -> SweepReport:
    """Reads a sweep.

    Args:
        tracker: Connected to MLflow.
        parent_run_id: Of the sweep's run.

    Raises:
        UserError: The run is no sweep.
        WorldError: MLflow is away, or does not know the run.
    """
    parent = tracker.recorded(parent_run_id)
    metric = parent.tags.get("ddpm.objective")
    if parent.tags.get("ddpm.kind") != "sweep" or metric is None:
        raise UserError(f"run {parent.name!r} is no sweep with an objective: give the name of a sweep of jobs/tune.py")
    children = tracker.children(parent)
    trials = _trials(tracker, children, metric)
    ranked = [trial for trial in trials if trial.mean is not None]
    csv = tracker.artifact(parent.run_id, CSV_FILE)
    identity = parent.tags.get("ddpm.protocol", "")
    return SweepReport(
        name=parent.name,
        run_id=parent.run_id,
        experiment=str(tracker.client.get_experiment(parent.experiment_id).name),
        status=parent.status,
        metric=metric,
        verdict=parent.tags.get("ddpm.verdict", ""),
        identity=identity,
        protocol=_protocol(tracker, parent.experiment_id, ranked, identity),
        trials=trials,
        refused=[
            (str(entry.get("key", "")), str(entry.get("reason", "")))
            for entry in _json_list(tracker.artifact(parent.run_id, REFUSED_FILE))
        ],
        sampled=_sampled(tracker, trials),
        best_sheet=_sheet(tracker, ranked[0]) if ranked else None,
        worst_sheet=_sheet(tracker, ranked[-1]) if len(ranked) > 1 else None,
        csv="" if csv is None else csv.decode(),
        csv_location=tracker.artifact_location(parent, CSV_FILE),
        commands=commands(
            parent.name,
            best=ranked[0].params if ranked else None,
            ui=tracker.ui_command(parent.run_id, parent.experiment_id),
            compared=[run.run_id for trial in ranked for run in trial.runs if run.value is not None][:_MOST_COMPARED],
            experiment_id=parent.experiment_id,
        ),
    )


def _trials(tracker: Tracker, children: Sequence[RecordedRun], metric: str) -> list[TrialReport]:
    groups: dict[str, list[RecordedRun]] = {}
    for child in children:
        groups.setdefault(child.tags.get("ddpm.trial", child.name), []).append(child)
    params = {key: {name: _parsed(text) for name, text in runs[0].params.items()} for key, runs in groups.items()}
    names = _searched(list(params.values()))
    trials = [
        TrialReport(
            key=key,
            knobs={name: params[key][name] for name in names if _counts(name, params[key])},
            runs=sorted((_seed_run(tracker, run, metric) for run in runs), key=lambda run: (run.seed, run.run)),
            params=runs[0].params,
        )
        for key, runs in groups.items()
    ]
    return sorted(trials, key=lambda trial: (trial.mean is None, trial.mean or 0.0, _STATUSES.index(trial.status)))


def _searched(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Knobs that differ between trials; schedule and T always, since every reader asks for them."""
    names = dict.fromkeys([*FIRST, *(name for each in params for name in each)])

    def differs(name: str) -> bool:
        return len({str(each[name]) for each in params if name in each and _counts(name, each)}) > 1

    found = [name for name in names if name in ("schedule", "T") or (name not in _NOT_SEARCHED and differs(name))]
    # A beta range is told whole.
    return [name for name in names if name in found or (name in BETAS and {*BETAS} & set(found))]


def _counts(name: str, params: Mapping[str, Any]) -> bool:
    """Whether a knob has a meaning for a trial's schedule."""
    return name in params and name not in (BETAS if params.get("schedule") == "cosine" else _COSINE_ONLY)


def _seed_run(tracker: Tracker, run: RecordedRun, metric: str) -> SeedRun:
    given = run.tags.get("ddpm.trial_status", "")
    status = next((each for each in _STATUSES if each == given), _BY_STATUS.get(run.status, "running"))
    curve = _finite(tracker.history(run.run_id, metric)) if metric in run.metrics else []
    rungs = _finite(tracker.history(run.run_id, f"{metric}/rung")) if f"{metric}/rung" in run.metrics else []
    seed = run.tags.get("ddpm.seed", run.params.get("seed", "0"))
    return SeedRun(
        run=run.name,
        run_id=run.run_id,
        seed=int(seed) if seed.isdecimal() else 0,
        status=status,
        error=run.tags.get("ddpm.error", "" if given or status != "stopped" else _interrupted(run)),
        value=curve[-1][1] if status == "finished" and curve else None,
        curve=curve,
        rungs=rungs,
        seconds=run.metrics.get("sweep/seconds"),
        images=run.metrics.get("sweep/images_seen"),
    )


def _interrupted(run: RecordedRun) -> str:
    """Why a run was killed that its sweep did not stop."""
    reason = run.tags.get("ddpm.ended", "")
    return f"interrupted: {reason}" if reason else "interrupted"


def _finite(values: Mapping[int, float]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]


def _protocol(tracker: Tracker, experiment_id: str, ranked: Sequence[TrialReport], identity: str) -> Mapping[str, Any]:
    """The protocol's fields, as they are stored with any result of it."""
    for run in (run for trial in ranked for run in trial.runs if run.value is not None):
        for checkpoint in tracker.checkpoints(experiment_id, run_id=run.run_id):
            if identity in (results := checkpoint.results()):
                return dict(results[identity]["protocol"])
    return {}


def _sampled(tracker: Tracker, trials: Sequence[TrialReport]) -> list[SampledResult]:
    found = [
        SampledResult(
            trial=trial.words,
            seed=run.seed,
            knobs=entry["knobs"],
            value=float(entry["value"]),
            identity=str(entry.get("identity", "")),
        )
        for trial in trials
        for run in trial.runs
        for entry in _json_list(tracker.artifact(run.run_id, SAMPLING_FILE))
        if isinstance(entry.get("knobs"), dict) and isinstance(entry.get("value"), int | float)
    ]
    return sorted((entry for entry in found if math.isfinite(entry.value)), key=lambda entry: entry.value)


def _json_list(data: bytes | None) -> list[dict[str, Any]]:
    """What an artifact lists; what is damaged or of another form is left out."""
    try:
        entries = json.loads(data or b"[]")
    except ValueError:
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _sheet(tracker: Tracker, trial: TrialReport) -> Sheet | None:
    """The last sample sheet of the trial's best seed, or of the next one that has a sheet."""
    for run in sorted((run for run in trial.runs if run.value is not None), key=lambda run: run.value or 0.0):
        if (found := tracker.last_sheet(run.run_id)) is not None:
            png = shrink_png(found[1], _SHEET_SIDE)
            return None if png is None else Sheet(trial=trial, run=run, step=found[0], png=png)
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
