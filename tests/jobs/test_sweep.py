"""Sweeps as a person runs them: processes on a cluster of two CPUs, one of them killed in the middle."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from clusters import Cluster, cluster
from runner import ROOT, TINY, run_job, succeed

from pipeline.sweep.record import SweepRecord
from pipeline.tracking import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = [*TINY, "--quality-images", "0", "--num-images", "20", "--chunk-size", "20", "--Ts", "100"]
METRIC = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[Cluster]:
    """One node of two CPUs, shared by all tests of this file: each of them starts its driver on it."""
    with cluster(head_cpus=2, preemption=False) as nodes:
        yield nodes


@pytest.fixture
def ray(two_cpus: Cluster, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets jobs join the cluster and gives this test a data set and a store of its own."""
    for name, value in two_cpus.environment.items():
        monkeypatch.setenv(name, value)
    succeed("prepare_data")


def client() -> MlflowClient:
    """The sweep's own store, read as anybody would."""
    return MlflowClient(f"sqlite:///{os.environ['DDPM_HOME']}/mlflow.db")


def children(mlflow: MlflowClient, parent: str) -> dict[str, Any]:
    """Runs of a sweep by name."""
    run = mlflow.get_run(parent)
    found = mlflow.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {child.info.run_name: child for child in found}


def test_six_trials_on_two_cpus_end_though_one_diverges_and_alike_trials_are_alike_to_the_bit(ray: None) -> None:
    """``log_every`` changes nothing, so two trials are identical; two are trained by another number of workers."""
    space = ["--schedules", "cosine", "--search", "lr=choice(0.002,1e30)", "log_every=choice(4,5,10)"]
    options = ["--num-workers", "1", "--sampling-search", "sampling_steps=choice(2)", "--register", "best"]
    result = succeed("tune", *SMALL, *space, *options, "--name", "six")
    by_run = {trial["run"]: trial for trial in result["trials"]}
    assert len(by_run) == 6
    good = [trial for trial in by_run.values() if trial["knobs"]["lr"] == 0.002]
    assert {trial["status"] for trial in good} == {"finished"}
    assert len({trial["value"] for trial in good}) == 1
    assert len({trial["sampled"][0]["value"] for trial in good}) == 1
    wild = [trial for trial in by_run.values() if trial["knobs"]["lr"] == 1e30]
    assert {trial["status"] for trial in wild} == {"failed"}
    assert all("not finite" in trial["error"] for trial in wild)

    mlflow = client()
    parent = mlflow.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["ddpm.objective"] == METRIC
    assert parent.data.tags["ddpm.protocol"] == result["protocol"]
    assert parent.data.tags["ddpm.verdict"] == result["verdict"]
    assert parent.data.params["search"] == '["lr=choice(0.002,1e30)", "log_every=choice(4,5,10)"]'
    runs = children(mlflow, result["run_id"])
    for name, trial in by_run.items():
        run = runs[name]
        assert run.info.run_id == trial["run_id"]
        assert run.data.tags["ddpm.trial"] == trial["point"]
        assert run.data.tags["ddpm.trial_status"] == trial["status"]
        assert run.info.status == {"finished": "FINISHED", "failed": "FAILED"}[trial["status"]]
        if trial["status"] == "failed":
            assert run.data.tags["ddpm.error"] == trial["error"]
            continue
        assert run.data.metrics[METRIC] == trial["value"]
        assert run.data.metrics["sweep/images_seen"] == 20 * 32
        sampled = json.loads(mlflow_text(mlflow, run.info.run_id, "sampling_search.json"))
        assert [entry["knobs"] for entry in sampled] == [{"sampling_steps": 2}]
        assert sampled[0]["identity"] != result["protocol"]
        assert [m.step for m in mlflow.get_metric_history(run.info.run_id, METRIC)] == [20]
    table = list(csv.DictReader(io.StringIO(mlflow_text(mlflow, result["run_id"], "sweep.csv"))))
    assert {(row["lr"], row["log_every"]) for row in table} == {
        (lr, n) for lr in ("0.002", "1e+30") for n in ("4", "5", "10")
    }
    version = mlflow.get_model_version_by_alias("best", "champion")
    assert version.tags["run"] == result["winner"]["run"]
    assert result["winner"]["value"] == min(trial["value"] for trial in good)
    assert {f.path for f in mlflow.list_artifacts(result["run_id"])} >= {"sweep.csv", "sweep.txt"}
    # The same sweep again trains and measures nothing that is there, and gives the same numbers.
    again = succeed("tune", *SMALL, *space, *options, "--name", "six")
    assert {t["run"]: t["value"] for t in again["trials"]} == {t["run"]: t["value"] for t in result["trials"]}
    assert len(mlflow.search_runs([parent.info.experiment_id])) == 7


def mlflow_text(mlflow: MlflowClient, run_id: str, name: str) -> str:
    """An artifact of a run."""
    return Path(mlflow.download_artifacts(run_id, name)).read_text()


def test_the_objective_does_not_depend_on_the_number_of_workers(ray: None) -> None:
    words = ["--schedules", "linear", "--search", "num_workers=choice(1,2)", "--num-workers", "2", "--name", "workers"]
    one, two = succeed("tune", *SMALL, *words)["trials"]
    assert {one["knobs"]["num_workers"], two["knobs"]["num_workers"]} == {1, 2}
    assert one["value"] == pytest.approx(two["value"], rel=1e-3)


def test_a_killed_sweep_is_restored_with_the_same_trials_and_runs_and_none_of_them_twice(ray: None) -> None:
    """Three learning rates; early stopping looks at step 10, which the first trials have passed."""
    words = [*SMALL, "--schedules", "cosine", "--search", "lr=choice(0.002,0.001,0.0001)", "--num-workers", "1"]
    words += ["--early-stopping", "--rung-images", "20", "--reduction-factor", "2", "--name", "killed"]
    log = Path(os.environ["DDPM_HOME"]) / "sweep.log"
    with log.open("wb") as output:
        driver = subprocess.Popen([sys.executable, "jobs/tune.py", *words], cwd=ROOT, stdout=output, stderr=output)
        deadline = time.monotonic() + 400
        while not (before := finished("killed")):  # the first trial at the rung is never stopped
            assert time.monotonic() < deadline, log.read_text()
            assert driver.poll() is None, log.read_text()
            time.sleep(0.1)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    mlflow = client()
    parent = mlflow.search_runs(["1"], "attributes.run_name = 'killed'")[0]
    assert parent.info.status == "RUNNING"
    runs_before = {name: run.info.run_id for name, run in children(mlflow, parent.info.run_id).items()}
    losses = {name: mlflow.get_metric_history(runs_before[name], "train/loss") for name in before}

    result = succeed("tune", "--restore", "killed")
    assert result["run_id"] == parent.info.run_id
    trials = {trial["run"]: trial for trial in result["trials"]}
    assert len(trials) == 3
    runs = children(mlflow, parent.info.run_id)
    assert runs.keys() == trials.keys()
    assert {name: runs[name].info.run_id for name in runs_before} == runs_before
    for name in before:
        record = before[name]
        assert (trials[name]["value"], trials[name]["seconds"]) == (record.value, record.seconds)
        assert mlflow.get_metric_history(runs[name].info.run_id, "train/loss") == losses[name]
        assert "zz.driver.2" in runs[name].data.params  # one before the rung, one behind it
        assert "zz.driver.3" not in runs[name].data.params
    for name, trial in trials.items():
        assert runs[name].info.status == {"finished": "FINISHED", "stopped": "KILLED"}[trial["status"]]
        assert [m.step for m in mlflow.get_metric_history(runs[name].info.run_id, f"{METRIC}/rung")] == [10]
        steps = [m.step for m in mlflow.get_metric_history(runs[name].info.run_id, "train/loss")]
        assert steps == ([5, 10, 15, 20] if trial["status"] == "finished" else [5, 10])
    assert mlflow.get_run(parent.info.run_id).info.status == "FINISHED"


def finished(name: str) -> dict[str, Any]:
    """Trials that the record says have finished, by run."""
    record = SweepRecord.load(name)
    ended = {} if record is None else record.ended
    return {f"{name}-{key}": entry for key, entry in ended.items() if entry.status == "finished"}


def test_restore_without_such_a_sweep_or_with_other_flags_is_refused() -> None:
    done = run_job("tune", "--restore", "nobody")
    assert (done.code, "no sweep of this name" in done.stderr) == (2, True)
    done = run_job("tune", "--restore", "nobody", "--seeds", "2")
    assert (done.code, "give no other flag" in done.stderr) == (2, True)
