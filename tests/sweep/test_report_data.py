"""A sweep in a real MLflow store becomes the data of its report."""

import io
import json
import time
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Metric, Param
from PIL import Image

from pipeline.config import TrainConfig, as_params, override, to_flat
from pipeline.errors import UserError
from pipeline.sweep.report_data import collect
from pipeline.sweep.report_html import sweep_report
from pipeline.tracking import Tracker

M = "fd_efficientnet"


def add(tracker: Tracker, name: str, tags: dict[str, str], status: str = "FINISHED", **given: Any) -> str:
    """A run as a sweep leaves it, made in a moment: what counts here is what is read."""
    experiment = tracker.experiment("ddpm", create=True)
    run_id: str = tracker.client.create_run(experiment, run_name=name, tags=tags).info.run_id
    now = int(time.time() * 1000)
    tracker.client.log_batch(
        run_id,
        params=[Param(key, text) for key, text in given.get("params", {}).items()],
        metrics=[Metric(key, value, now, step) for key, step, value in given.get("metrics", ())],
    )
    for file, text in given.get("files", {}).items():
        tracker.client.log_text(run_id, text, file)
    tracker.client.set_terminated(run_id, status)
    return run_id


def parent(tracker: Tracker, **files: str) -> str:
    tags = {"ddpm.kind": "sweep", "ddpm.objective": M, "ddpm.verdict": "cosine won", "ddpm.protocol": "abc"}
    return add(tracker, "sweep", tags, files={name.replace("__", "."): text for name, text in files.items()})


def child(tracker: Tracker, of: str, key: str, *curve: tuple[int, float], seed: int = 0, **given: Any) -> str:
    knobs = {"name": f"sweep-{key}-{seed}", "seed": seed, **given.pop("knobs")}
    tags = {"mlflow.parentRunId": of, "ddpm.trial": key, "ddpm.seed": str(seed), "ddpm.trial_status": "finished"}
    metrics = [(M, step, value) for step, value in curve] + given.pop("metrics", [])
    params = as_params(to_flat(override(TrainConfig(), knobs)))
    return add(tracker, knobs["name"], tags | given.pop("tags", {}), params=params, metrics=metrics, **given)


COSINE, LINEAR = {"schedule": "cosine", "T": 100}, {"schedule": "linear", "T": 100, "beta_end": 0.03}


def test_trials_are_grouped_over_their_seeds_and_ranked(tracker: Tracker) -> None:
    sweep = parent(tracker)
    child(tracker, sweep, "l", (10, 50.0), (20, 30.0), knobs=LINEAR, metrics=[("sweep/seconds", 20, 7.0)])
    for seed, value in ((1, 22.0), (0, 20.0)):
        child(tracker, sweep, "c", (20, value), (10, 40.0), seed=seed, knobs=COSINE)
    child(tracker, sweep, "m", (20, 25.0), knobs={**LINEAR, "beta_end": 0.02})
    add(tracker, "a run of somebody else", {})
    report = collect(tracker, sweep)
    assert (report.name, report.experiment, report.metric, report.verdict) == ("sweep", "ddpm", M, "cosine won")
    assert [(trial.key, trial.mean) for trial in report.trials] == [("c", 21.0), ("m", 25.0), ("l", 30.0)]
    best, _, linear = report.trials
    assert (best.values, best.error, best.status) == ([20.0, 22.0], pytest.approx(1.0), "finished")
    assert best.runs[0].curve == [(10, 40.0), (20, 20.0)]
    assert linear.runs[0].seconds == 7.0
    assert linear.words == "linear T=100 \N{GREEK SMALL LETTER BETA}\N{NO-BREAK SPACE}1e\N{MINUS SIGN}4:0.03"
    assert best.knobs == COSINE  # A cosine trial has no beta range, whatever its config says.
    assert report.varying() == ["schedule", "beta_end"]


def test_stopped_and_failed_trials_have_no_value_and_an_outcome(tracker: Tracker) -> None:
    sweep = parent(tracker)
    failed = {"ddpm.trial_status": "failed", "ddpm.error": "loss is nan"}
    child(tracker, sweep, "f", knobs=COSINE, tags=failed, status="FAILED", metrics=[(M, 10, float("nan"))])
    rung = [(f"{M}/rung", 10, 90.0)]
    child(tracker, sweep, "s", (10, 80.0), knobs=LINEAR, tags={"ddpm.trial_status": "stopped"}, metrics=rung)
    killed = {"ddpm.trial_status": "", "ddpm.ended": "its sweep ended"}
    child(tracker, sweep, "k", (10, 70.0), knobs=LINEAR, tags=killed, status="KILLED")
    trials = {trial.key: trial for trial in collect(tracker, sweep).trials}
    assert {key: (trial.mean, trial.status) for key, trial in trials.items()} == {
        "f": (None, "failed"),
        "s": (None, "stopped"),
        "k": (None, "stopped"),
    }
    errors = {key: trial.runs[0].error for key, trial in trials.items()}
    assert errors == {"f": "loss is nan", "s": "", "k": "interrupted: its sweep ended"}
    assert (trials["s"].runs[0].rungs, trials["s"].runs[0].last_step) == ([(10, 90.0)], 10)


def test_artifacts_are_read_and_damaged_ones_left_out(tracker: Tracker) -> None:
    refused = json.dumps([{"key": "linear-T10", "reason": "beta above 1"}, "nonsense"])
    sweep = parent(tracker, sweep__csv="a,b\n", refused__json=refused)
    entries = [
        {"knobs": {"sampling_steps": 10}, "value": 30.0, "identity": "x"},
        {"knobs": {"sampling_steps": 20}, "value": 25.0, "identity": "y"},
        {"knobs": 3, "value": "?"},
    ]
    child(tracker, sweep, "c", (20, 20.0), knobs=COSINE, files={"sampling_search.json": json.dumps(entries)})
    child(tracker, sweep, "l", (20, 30.0), knobs=LINEAR, files={"sampling_search.json": "{cut off"})
    report = collect(tracker, sweep)
    assert (report.csv, list(report.refused)) == ("a,b\n", [("linear-T10", "beta above 1")])
    assert report.csv_location.endswith("/sweep.csv")
    assert [(result.identity, result.value) for result in report.sampled] == [("y", 25.0), ("x", 30.0)]


def test_sheets_of_the_best_and_the_worst_are_shown_shrunk_if_they_are_large(tracker: Tracker) -> None:
    sweep = parent(tracker)
    runs = {
        key: child(tracker, sweep, key, (20, value), knobs={**LINEAR, "T": T})
        for key, value, T in (("worst", 30.0, 400), ("best", 20.0, 100), ("middle", 25.0, 200))
    }
    for key, side in (("best", 64), ("worst", 3000)):
        sheet = np.zeros((side, side, 3), np.uint8)
        tracker.client.log_image(runs[key], sheet, key="samples", step=20, synchronous=True)
    report = collect(tracker, sweep)
    assert report.best_sheet is not None
    assert report.worst_sheet is not None
    assert (report.best_sheet.trial.key, report.worst_sheet.trial.key) == ("best", "worst")
    widths = [Image.open(io.BytesIO(sheet.png)).width for sheet in (report.best_sheet, report.worst_sheet)]
    assert widths == [64, 1024]


def test_the_protocol_is_read_from_the_result_of_a_trial(tracker: Tracker, tmp_path: Any) -> None:
    sweep = parent(tracker)
    run = tracker.start_run("sweep-c", experiment="ddpm", params=as_params(to_flat(TrainConfig())), tags={})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "meta.json").write_text("{}")
    run.publish(tmp_path / "model", 20, {})
    (checkpoint,) = tracker.checkpoints(run.experiment_id, run_id=run.run_id)
    protocol = {"metric": M, "num_images": 200, "note": "the bias is large"}
    tracker.log_result(checkpoint, identity="abc", protocol=protocol, metrics={M: 20.0})
    run.set_tags({"mlflow.parentRunId": sweep, "ddpm.trial": "c", "ddpm.trial_status": "finished"})
    run.finish("FINISHED")
    assert collect(tracker, sweep).protocol == protocol
    page = sweep_report(tracker, sweep)
    assert "<p class='unlike'>the bias is large.</p>" in page
    assert "<p class='verdict'>cosine won</p>" in page


def test_the_report_that_a_sweep_writes_at_its_end_does_not_say_that_it_goes_on(tracker: Tracker) -> None:
    sweep = add(tracker, "s", {"ddpm.kind": "sweep", "ddpm.objective": M}, status="RUNNING")
    assert "had not ended" in sweep_report(tracker, sweep)
    assert "had not ended" not in sweep_report(tracker, sweep, by_itself=True)


def test_a_run_that_is_no_sweep_is_refused(tracker: Tracker) -> None:
    with pytest.raises(UserError, match=r"^run 'a' is no sweep with an objective"):
        collect(tracker, add(tracker, "a", {}))
