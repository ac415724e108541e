"""Whatever dies, whenever it dies: the final weights are bit for bit those of the run that nobody touched."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from clusters import Cluster, cluster, tree
from runner import ROOT, TINY, succeed

from pipeline.training.checkpoint import checkpoint_name
from pipeline.training.committed import SNAPSHOT, committed_checkpoints, damage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS, EVERY = 400, 50
WORDS = [*TINY, "--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--log-every", "10", "--keep-checkpoints", "8"]
WORDS += ["--dropout", "0.1", "--random-flip", "--num-workers", "2", "--max-failures", "10"]
WORDS += ["--worker-timeout-seconds", "15", "--storage-patience-seconds", "5"]

Record = dict[str, Any]


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """A head and a second node, with one CPU each."""
    with cluster(head_cpus=1) as nodes:
        nodes.add_node(num_cpus=1)
        yield nodes


def read_audit(folder: Path) -> dict[str, list[Record]]:
    """Lines by rank, in the order of their writing."""
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}


class Job:
    """The train command on a cluster, started again and again."""

    def __init__(self, nodes: Cluster, name: str, audit: Path) -> None:
        words = [*WORDS, "--name", name, "--audit-dir", str(audit)]
        self._command = [sys.executable, "jobs/train.py", *words]
        self._environment = {**os.environ, **nodes.environment}
        self._log = audit.with_suffix(".log")
        self._audit = audit / "rank-00000-of-00002.jsonl"
        self.process = self.start()

    @property
    def log(self) -> str:
        """What the command has printed."""
        return self._log.read_text()

    def start(self) -> "subprocess.Popen[bytes]":
        """Starts the command."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self.process

    def wait_for(self, step: int) -> None:
        """Waits until this step was taken for the last time yet: until the newest line is at it or beyond."""
        before = len(self._lines())
        self._until(lambda: any(record["step"] >= step for record in map(json.loads, self._lines()[before:])))

    def recover(self, what: str) -> None:
        """Waits until a step is taken again, and prints how long that took."""
        started, before = time.monotonic(), len(self._lines())
        self._until(lambda: len(self._lines()) > before + 2)  # a line or two may have been on their way
        print(f"{what}: training again after {time.monotonic() - started:.0f} s")

    def wait_for_unplanned_checkpoint(self, folder: Path) -> int:
        """Waits until a checkpoint that is not due by its step is committed; returns the step."""

        def found() -> list[int]:
            return [step for step in committed_checkpoints(str(folder)) if step % EVERY]

        self._until(lambda: bool(found()))
        return found()[0]

    def finish(self) -> None:
        """Waits for the command, which must succeed."""
        self._until(lambda: self.process.poll() is not None)
        assert self.process.returncode == 0, self.log

    def _lines(self) -> list[str]:
        """Whole lines: the last may be being written."""
        return self._audit.read_text().split("\n")[:-1] if self._audit.exists() else []

    def _until(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() in (None, 0), self.log
            time.sleep(0.05)


def final_files(home: str, name: str) -> dict[str, str]:
    """sha256 by file of the last checkpoint, verified."""
    folder = Path(home) / "runs" / name / f"step-{STEPS:08d}"
    assert damage(str(folder)) is None
    return json.loads((folder / "meta.json").read_text())["files"]


def repeated_after_each_failure(records: list[Record]) -> list[int]:
    """Steps taken again, at each return to an earlier one."""
    pairs = itertools.pairwise(record["step"] for record in records)
    return [now - later + 1 for now, later in pairs if later <= now]


def test_the_weights_do_not_depend_on_what_is_killed_and_when(tmp_path: Path, two_nodes: Cluster) -> None:
    succeed("prepare_data")
    home = os.environ["DDPM_HOME"]
    Job(two_nodes, "untouched", tmp_path / "untouched").finish()

    seed = int(os.environ.get("DDPM_CHAOS_SEED", time.time()))
    chance = random.Random(seed)
    moments = [chance.randrange(EVERY + 100 * n + 5, EVERY + 100 * n + 60) for n in range(3)]
    moments.append(chance.randrange(370, 395))
    print(f"DDPM_CHAOS_SEED={seed}: killing at steps {moments}")
    job = Job(two_nodes, "touched", tmp_path / "touched")

    job.wait_for(moments[0])
    chance.choice(two_nodes.workers()).send_signal(signal.SIGKILL)
    job.recover("worker killed")

    job.wait_for(moments[1])
    stopped = chance.choice(two_nodes.workers())
    stopped.send_signal(signal.SIGSTOP)  # it is never continued
    job.recover("worker stopped")

    job.wait_for(moments[2])
    assert not stopped.is_running(), "the stopped worker was left behind"
    leaving = two_nodes.nodes.pop()
    two_nodes.announce_end(leaving, seconds=300)
    unplanned = job.wait_for_unplanned_checkpoint(Path(home) / "runs" / "touched")
    leaving.kill()
    two_nodes.add_node(num_cpus=1)
    job.recover("announced node killed")

    job.wait_for(moments[3])
    job.process.kill()
    job.process.wait()
    snapshot = json.loads((Path(home) / "runs" / "touched" / SNAPSHOT).read_text())
    newest = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    os.truncate(Path(home) / "runs" / "touched" / newest / "model.safetensors", 1000)
    job.start()
    job.recover("driver killed")
    job.finish()

    warnings = [line for line in job.log.splitlines() if "the newest whole checkpoint" in line]
    assert len(warnings) == 1
    assert f"{newest}/model.safetensors is damaged" in warnings[0]
    assert final_files(home, "touched") == final_files(home, "untouched")
    untouched, touched = read_audit(tmp_path / "untouched"), read_audit(tmp_path / "touched")
    assert untouched.keys() == touched.keys()
    for rank, records in touched.items():
        truth = {record["step"]: record for record in untouched[rank]}
        assert sorted(truth) == list(range(STEPS)) == sorted({record["step"] for record in records})
        assert [record for record in records if record != truth[record["step"]]] == []
    *after_deaths, after_damage = repeated_after_each_failure(touched["rank-00000-of-00002.jsonl"])
    print(f"steps repeated after each failure: {after_deaths}, after the damage: {after_damage}")
    while_committing = 40
    assert all(repeated <= EVERY + while_committing for repeated in after_deaths)
    assert after_damage <= 2 * EVERY + while_committing
    print(f"checkpoint at the notice: step {unplanned}")
    check_mlflow(home, unplanned, was_damaged=newest == checkpoint_name(unplanned))


def check_mlflow(home: str, unplanned: int, *, was_damaged: bool) -> None:
    """One run that is finished, each step and each checkpoint at most once."""
    mlflow = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = mlflow.get_experiment_by_name("ddpm").experiment_id
    (run,) = mlflow.search_runs([experiment], "tags.`mlflow.runName` = 'touched'")
    assert run.info.status == "FINISHED"
    steps = [metric.step for metric in mlflow.get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps))
    print(f"not in MLflow: {sorted(set(range(10, STEPS + 1, 10)) - set(steps))}")
    models = mlflow.search_logged_models([experiment], f"source_run_id = '{run.info.run_id}'")
    published = sorted(int(model.tags["step"]) for model in models)
    assert [step for step in published if step != unplanned] == list(range(EVERY, STEPS + 1, EVERY))
    # Truncated before it was published, it is not made again: nobody is told a second time.
    assert published.count(unplanned) == 1 or (published.count(unplanned) == 0 and was_damaged)


def test_a_killed_driver_takes_its_private_cluster_along_and_the_same_command_goes_on(tmp_path: Path) -> None:
    succeed("prepare_data")
    words = [*WORDS, "--steps", "150", "--name", "alone", "--audit-dir", str(tmp_path)]
    with subprocess.Popen([sys.executable, "jobs/train.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL) as job:
        checkpoint = Path(os.environ["DDPM_HOME"]) / "runs" / "alone" / SNAPSHOT
        deadline = time.monotonic() + 400
        while not checkpoint.exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        cluster_of_job = tree(job.pid)[1:]
        job.kill()
    killed = time.monotonic()
    _, alive = psutil.wait_procs(cluster_of_job, timeout=400)  # Ray's own agents notice last
    print(f"{len(cluster_of_job)} processes were gone after {time.monotonic() - killed:.1f} s")
    assert alive == []
    assert succeed("train", *words)["step"] == 150
