import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from publishing import prepare_digits, publish_run

from pipeline.config import SamplingConfig, TrainConfig, TuneConfig
from pipeline.errors import UserError
from pipeline.sweep.bookkeeping import Bookkeeper, task_of
from pipeline.sweep.points import Listed, open_source
from pipeline.sweep.record import Ended, SampledAs, SweepRecord
from pipeline.sweep.session import run_sweep
from pipeline.sweep.space import Point, Trial
from pipeline.sweep.trial_run import ENDED, OBJECTIVE, STEP
from pipeline.sweep.tuner import tune
from pipeline.tracking import TrackedRun, Tracker

METRIC = "fd_efficientnet_lite0"
CONFIG = TuneConfig(
    schedules=("linear", "cosine", "sigmoid"),
    Ts=(100,),
    base=replace(TrainConfig(), steps=20, sampling=replace(SamplingConfig(), sampling_steps=4)),
)


@pytest.fixture
def sweep(tracker: Tracker) -> tuple[Bookkeeper, SweepRecord, TrackedRun, Sequence[Point]]:
    """A sweep of three trials that has just begun, with a run for each trial."""
    source = open_source(CONFIG)
    assert isinstance(source, Listed)
    record = SweepRecord(name="s", config=CONFIG, points={point.key: point for point in source.points})
    parent = tracker.start_run("s", experiment="ddpm", params={"seeds": 1}, tags={"ddpm.kind": "sweep"})
    return Bookkeeper(CONFIG, record, source, tracker, parent), record, parent, source.points


def _start(tracker: Tracker, parent: TrackedRun, point: Point) -> tuple[TrackedRun, Trial, Any]:
    trial = point.trials(CONFIG)[0]
    run = tracker.start_run(
        f"s-{trial.key}", experiment="ddpm", params={"T": 100}, tags={}, parent_run_id=parent.run_id
    )
    tune_trial = SimpleNamespace(config=task_of(trial), last_result={"time_total_s": 7.0}, get_error=lambda: None)
    return run, trial, tune_trial


def test_how_trials_ended_is_on_disk_and_on_their_runs(
    tracker: Tracker, sweep: tuple[Bookkeeper, SweepRecord, TrackedRun, Sequence[Point]]
) -> None:
    keeper, record, parent, points = sweep
    finished, stopped, failed = (_start(tracker, parent, point) for point in points)
    sampled = (SampledAs(knobs={"sampling_steps": 2}, value=9.0, identity="other"),)
    end = Ended(
        status="finished", step=20, value=3.5, run_id=finished[0].run_id, seconds=5.0, images_seen=1280, sampled=sampled
    )
    finished[0].finish("FINISHED")
    keeper.on_trial_result(0, [], finished[2], json.loads(json.dumps({ENDED: asdict(end), STEP: 20, OBJECTIVE: 3.5})))
    keeper.on_trial_complete(0, [], finished[2])
    stopped[0].finish("FINISHED")  # this part of the training was over when Tune decided
    keeper.on_trial_result(0, [], stopped[2], {STEP: 10, OBJECTIVE: 8.0})
    keeper.on_trial_complete(0, [], stopped[2])
    failed[2].get_error = lambda: RuntimeError("a trace\nWorkerCrashedError: out of memory")
    keeper.on_trial_error(0, [], failed[2])

    saved = SweepRecord.load("s")
    assert saved is not None
    assert saved.ended == record.ended
    assert [saved.ended[entry[1].key].status for entry in (finished, stopped, failed)] == [
        "finished",
        "stopped",
        "failed",
    ]
    assert saved.ended[stopped[1].key].rungs == {10: 8.0}
    runs = [tracker.client.get_run(entry[0].run_id) for entry in (finished, stopped, failed)]
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED", "FAILED"]
    assert [run.data.tags["ddpm.trial_status"] for run in runs] == ["finished", "stopped", "failed"]
    assert [run.data.tags["ddpm.trial"] for run in runs] == [point.key for point in points]
    assert runs[2].data.tags["ddpm.error"] == "WorkerCrashedError: out of memory"
    assert runs[0].data.metrics == {"sweep/images_seen": 1280, "sweep/seconds": 5}
    assert runs[1].data.metrics == {"sweep/images_seen": 640, "sweep/seconds": 7}
    assert json.loads(_text(tracker, runs[0].info.run_id)) == [asdict(sampled[0])]


def _text(tracker: Tracker, run_id: str) -> str:
    return Path(tracker.client.download_artifacts(run_id, "sampling_search.json")).read_text()


def test_a_sweep_whose_trials_have_all_ended_is_restored_without_ray(tracker: Tracker) -> None:
    prepare_digits()
    source = open_source(CONFIG)
    assert isinstance(source, Listed)
    record = SweepRecord(name="s", config=replace(CONFIG, register="best"))
    for value, point in zip((3.0, 2.0, 4.0), source.points, strict=True):
        run_id = publish_run(tracker, f"s-{point.key}", 20)
        record.points[point.key] = point
        record.ended[point.key] = Ended(status="finished", step=20, value=value, run_id=run_id)
    record.save()
    result = run_sweep(TuneConfig(restore="s"))
    assert not ray.is_initialized()
    assert result.winner is not None
    assert result.winner.run == "s-cosine-T100"
    assert result.registered == "champion of best: version 1, s-cosine-T100 step 20"
    run = tracker.client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["ddpm.verdict"].startswith(f"cosine T=100 won with {METRIC} 2.000")
    assert (run.data.tags["ddpm.objective"], run.data.tags["ddpm.kind"]) == (METRIC, "sweep")
    assert {file.path for file in tracker.client.list_artifacts(result.run_id)} == {
        "refused.json",
        "sweep.csv",
        "sweep.html",
        "sweep.txt",
    }
    again = run_sweep(TuneConfig(restore="s"))
    assert again.run_id == result.run_id


def test_a_sweep_does_not_go_on_with_another_budget_or_over_a_training_run(tracker: Tracker) -> None:
    prepare_digits()
    publish_run(tracker, "trained", 20)
    with pytest.raises(UserError, match="'trained' is a training run"):
        tune(CONFIG, "trained", tracker)
    point = open_source(CONFIG).next()
    assert point is not None
    only = replace(CONFIG, schedules=("linear",))
    record = SweepRecord(
        name="s", config=only, points={point.key: point}, ended={point.key: Ended(status="finished", value=1.0)}
    )
    record.save()
    assert tune(only, "s", tracker).winner is not None
    with pytest.raises(UserError, match="steps was 20, now 30"):
        tune(replace(only, base=replace(only.base, steps=30)), "s", tracker)
    with pytest.raises(UserError, match="objective was fd, now kid"):
        tune(replace(only, objective="kid"), "s", tracker)


def test_restore_takes_a_sweep_that_has_begun_and_no_other_flag() -> None:
    with pytest.raises(UserError, match="no sweep of this name has begun"):
        run_sweep(TuneConfig(restore="nobody"))
    with pytest.raises(UserError, match="give no other flag"):
        run_sweep(TuneConfig(restore="nobody", seeds=2))
    assert not os.path.exists(os.environ["DDPM_HOME"])
