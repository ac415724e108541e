"""Two machines with a cable between them that is pulled in mid-run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "training")]

import services
from clusters import RAY
from runner import ROOT, TINY, succeed
from two_nodes import TwoNodes, network, two_nodes, why_not
from worlds import run_one

from pipeline.config import TrainConfig, override
from pipeline.training.task import plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KNOBS = {"base_channels": 8, "batch_size": 32, "dropout": 0.1, "random_flip": True, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    """Two nodes of one CPU each."""
    if reason := why_not():
        pytest.skip(reason)
    with two_nodes() as pair:
        yield pair


@pytest.fixture
def submitting(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    """Two nodes whose environment is that of a writer on MLflow over PostgreSQL and S3, and a head that takes jobs."""
    if reason := why_not() or services.why_not():
        pytest.skip(reason)
    with network(dashboard=True) as pair, services.services(bind=pair.outside) as running:
        settings = running.environment("writer")
        pair.environment |= settings
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        pair.start_both()
        yield pair


class Run:
    """The train command beside the head; it trains until ``finish``."""

    def __init__(self, nodes: TwoNodes, folder: Path, workers: str) -> None:
        self._nodes, self._log = nodes, folder / "train.log"
        self.audit = folder / "audit"
        self.name = f"workers-{workers.replace(':', '-')}"
        self._words = [*TINY, "--checkpoint-every", "100", "--dropout", "0.1", "--random-flip", "--grid-images", "1"]
        self._words += ["--resize-seconds", "5", "--max-failures", "10"]
        self._words += ["--name", self.name, "--audit-dir", str(self.audit)]
        self._process = self._start("--num-workers", workers, "--steps", "1000000")

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        return self._nodes.popen([sys.executable, "jobs/train.py", *self._words, *words], self._log, ROOT)

    def finish(self) -> int:
        """Stops the command, and lets the same run end a little later; returns its number of steps."""
        self._stop()
        steps = max(self.steps(1) + self.steps(2)) // 5 * 5 + 20
        # A fixed number: Ray keeps the claim of an elastic run whose driver is gone for 180 s.
        self._process = self._start("--num-workers", "2", "--steps", str(steps))
        self.until(lambda: self._process.poll() is not None)
        return steps

    def _stop(self) -> None:
        for driver in psutil.Process(self._process.pid).children():  # nsenter passes no signals on
            driver.terminate()
        assert self._process.wait(300) == 130, self._log.read_text()

    def steps(self, num_workers: int) -> list[int]:
        """Steps that rank 0 of so many workers has taken, in order."""
        path = self.audit / f"rank-00000-of-{num_workers:05d}.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def until(self, condition: Callable[[], bool], seconds: float = 600) -> float:
        """Waits; returns the seconds it took."""
        started = time.monotonic()
        while not condition():
            late = time.monotonic() > started + seconds
            assert not late, f"{self._log.read_text()}\n{self._nodes.controller_log()}"
            assert self._process.poll() in (None, 0), self._log.read_text()
            time.sleep(0.2)
        return time.monotonic() - started


class SubmittedRun(Run):
    """The same by ``ray job submit``; the submitter's log is the job's."""

    _submissions = 0

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        self._submissions += 1
        job = [sys.executable, "jobs/train.py", *self._words, *words]
        return self._ray("job", "submit", "--submission-id", self._id, "--working-dir", ".", "--", *job)

    def _stop(self) -> None:
        assert self._ray("job", "stop", self._id).wait(300) == 0, self._log.read_text()
        self._process.wait(300)

    def _ray(self, *words: str) -> "subprocess.Popen[bytes]":
        return self._nodes.popen([*RAY, *words], self._log, ROOT, submitter(self._nodes))

    @property
    def _id(self) -> str:
        return f"train-{self._submissions}"


def submitter(nodes: TwoNodes) -> dict[str, str]:
    """The environment of a person who submits: the cluster's address and token."""
    token = {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    return {**token, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}


def run_beside(nodes: TwoNodes, words: list[str], log: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Runs a command beside the head; returns its exit status and what it said."""
    before = len(log.read_text()) if log.exists() else 0
    code = nodes.popen(words, log, ROOT, environment).wait(600)
    return code, log.read_text()[before:]


def read(folder: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Audit lines by (rank, number of workers)."""
    records = {}
    for file in folder.glob("*.jsonl"):
        _, rank, _, size = file.stem.split("-")
        records[int(rank), int(size)] = [json.loads(line) for line in file.read_text().splitlines()]
    return records


def check_audit(run: Run, folder: Path, num_steps: int) -> None:
    """Every line is its part of the batch that one untouched worker takes, and no step is missing."""
    data = f"{os.environ['DDPM_HOME']}/data/digits"
    truth_folder = folder / "truth"
    knobs = {**KNOBS, "data": data, "steps": num_steps, "num_workers": 1, "audit_dir": str(truth_folder)}
    run_one(plan(override(TrainConfig(), {**knobs, "checkpoint_every": num_steps})), folder / "out")
    truth = {record["step"]: record for record in read(truth_folder)[0, 1]}
    steps: dict[tuple[int, int], set[int]] = {}
    for (rank, size), records in read(run.audit).items():
        part = slice(rank * 32 // size, (rank + 1) * 32 // size)
        for record in records:
            for key in ("keys", "t", "eps_sha256"):
                assert record[key] == truth[record["step"]][key][part]
        steps[rank, size] = {record["step"] for record in records}
    together = steps.get((0, 2), set()) & steps.get((1, 2), set())
    assert steps.get((0, 1), set()) | together == set(range(num_steps))


def check_mlflow(run: Run, num_steps: int) -> MlflowClient:
    """Each step once, and a run that is finished."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{os.environ['DDPM_HOME']}/mlflow.db"
    mlflow = MlflowClient(uri)
    experiment = mlflow.get_experiment_by_name("ddpm").experiment_id
    (found,) = mlflow.search_runs([experiment], f"tags.`mlflow.runName` = '{run.name}'")
    assert found.info.status == "FINISHED"
    steps = [metric.step for metric in mlflow.get_metric_history(found.info.run_id, "train/loss")]
    assert steps == list(range(5, num_steps + 1, 5))
    return mlflow


def test_an_elastic_run_goes_on_without_the_node_that_is_cut_off_and_grows_when_it_is_back(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    succeed("prepare_data")
    run = Run(nodes, tmp_path, "1:2")
    run.until(lambda: len(run.steps(2)) > 60)
    nodes.cut()
    alone = len(run.steps(1))
    print(f"alone {run.until(lambda: len(run.steps(1)) > alone):.0f} s after the cut")
    together = len(run.steps(2))
    nodes.join()
    print(f"together {run.until(lambda: len(run.steps(2)) > together):.0f} s after the link was back")
    num_steps = run.finish()
    check_audit(run, tmp_path, num_steps)
    check_mlflow(run, num_steps)


def test_a_submitted_run_outlives_its_node_and_the_schedule_evaluates_it(submitting: TwoNodes, tmp_path: Path) -> None:
    """A fixed number of workers: the run waits for the node that is cut off, and goes on with its replacement."""
    log, stranger = tmp_path / "commands.log", {**submitter(submitting), "RAY_AUTH_MODE": "disabled"}
    stranger |= {"RAY_AUTH_TOKEN": ""}
    code, said = run_beside(submitting, [*RAY, "job", "submit", "--no-wait", "--", "true"], log, stranger)
    assert code != 0
    assert "token" in said.lower()
    doctor = [sys.executable, "-c", "from pipeline.doctor import servers; print(servers.ray_dashboard())"]
    assert "takes this token and refuses strangers" in run_beside(submitting, doctor, log, submitter(submitting))[1]
    wrong = submitter(submitting) | {"RAY_AUTH_TOKEN": "0" * 64}
    assert "refuses this token" in run_beside(submitting, doctor, log, wrong)[1]
    code, said = run_beside(submitting, [sys.executable, "jobs/prepare_data.py"], log, submitting.environment)
    assert code == 0, said
    run = SubmittedRun(submitting, tmp_path, "2")
    run.until(lambda: len(run.steps(2)) > 60)
    submitting.cut()
    time.sleep(30)
    together = len(run.steps(2))
    submitting.join()
    print(f"together {run.until(lambda: len(run.steps(2)) > together):.0f} s after the link was back")
    num_steps = run.finish()
    check_audit(run, tmp_path, num_steps)
    mlflow = check_mlflow(run, num_steps)
    tick = {**submitter(submitting), "DDPM_TICK": "tick-1", "DDPM_LOCK": str(tmp_path / "lock")}
    tick |= {"DDPM_PYTHON": sys.executable, "DDPM_CLUSTER_PYTHON": sys.executable}
    words = [str(ROOT / "infra/schedules/evaluate.sh"), "--num-images", "32", "--sampling-steps", "5"]
    code, said = run_beside(submitting, words, log, tick)
    assert code == 0, said
    models = mlflow.search_logged_models([mlflow.get_experiment_by_name("ddpm").experiment_id])
    measured = [
        model for model in models if any(metric.key == "fd_efficientnet_lite0" for metric in model.metrics or [])
    ]
    assert [model.tags["step"] for model in measured] == [str(num_steps)]
    code, said = run_beside(submitting, words, log, tick)
    assert (code, "was submitted before" in said) == (0, True), said
