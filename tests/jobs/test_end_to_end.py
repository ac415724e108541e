"""The four verbs as processes on a real local Ray cluster with a real MLflow store."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

sys.path.append(str(Path(__file__).parent))

from runner import ROOT, TINY, run_job, succeed

from pipeline.tracking import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def home(tracker: Tracker) -> str:
    """A prepared data set and a store under the test's own ``$DDPM_HOME``."""
    succeed("prepare_data")
    return os.environ["DDPM_HOME"]


def client(home: str) -> MlflowClient:
    """The run's own store, read as anybody would."""
    return MlflowClient(f"sqlite:///{home}/mlflow.db")


@pytest.mark.usefixtures("one_cluster")
def test_a_run_is_trained_tracked_published_and_evaluated_and_its_name_continues_it(home: str) -> None:
    measured = ["--evaluate", "--num-images", "40", "--chunk-size", "20", "--quality-images", "128"]
    result = succeed("train", *TINY, "--name", "first", *measured)
    assert (result["run"], result["step"]) == ("first", 20)
    assert result["metrics"]["fd_efficientnet_lite0"] > 0
    assert Path(result["grid"]).read_bytes().startswith(b"\x89PNG")
    assert result["run_id"] in result["mlflow"][-1]

    mlflow = client(home)
    run = mlflow.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["schedule"] == "linear"
    assert run.data.tags["mlflow.source.git.commit"]
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert [m.step for m in mlflow.get_metric_history(run.info.run_id, "train/loss")] == [5, 10, 15, 20]
    assert [m.step for m in mlflow.get_metric_history(run.info.run_id, "fd_efficientnet_lite0")] == [20]
    # The last checkpoint has a sheet; one before it that was still being made is given up for it.
    images = [file.path for file in mlflow.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(images) in (1, 2)

    models = {m.tags["step"]: m for m in mlflow.search_logged_models([run.info.experiment_id])}
    assert set(models) == {"10", "20"}
    assert (models["10"].tags["eval_status"], models["20"].tags["eval_status"]) == ("pending", "done")
    assert sorted(f.path for f in mlflow.list_logged_model_artifacts(models["20"].model_id)) == [
        "ema.safetensors",
        "meta.json",
    ]
    assert models["20"].metrics[0].key == "fd_efficientnet_lite0"

    # The evaluation follows by itself: the checkpoint that lacks a result gets one, then there is nothing to do.
    protocol = ["--num-images", "40", "--chunk-size", "20", "--sampling-steps", "5"]
    once = succeed("evaluate", "--pending", *protocol)["evaluated"]
    assert [(entry["run"], entry["step"]) for entry in once] == [("first", 10)]
    assert succeed("evaluate", "--pending", *protocol)["evaluated"] == []
    # One worker measures the same images as two: the same number to the last digit.
    identity = once[0]["identity"]
    mlflow.delete_logged_model_tag(models["10"].model_id, f"protocol.{identity}")
    alone = succeed("evaluate", "--run", "first", "--step", "10", *protocol, "--num-workers", "1")["evaluated"]
    assert [(entry["value"], entry["identity"]) for entry in alone] == [(once[0]["value"], identity)]

    # A damaged checkpoint is named and does not keep the others from their result.
    other = ["--num-images", "20", "--chunk-size", "5", "--sampling-steps", "4"]
    weights = Path(models["20"].artifact_location.removeprefix("file://")) / "ema.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    mixed = run_job("evaluate", "--pending", *other, "--json")
    weights.write_bytes(whole)
    assert mixed.code == 1
    assert [entry["step"] for entry in mixed.result["evaluated"]] == [10]
    assert [entry["step"] for entry in mixed.result["failed"]] == [20]
    assert "ema.safetensors" in mixed.result["failed"][0]["reason"]

    # The same command with more steps continues: each step once, the same run.
    more = succeed("train", *TINY, "--name", "first", "--steps", "30")
    assert (more["run_id"], more["step"]) == (result["run_id"], 30)
    history = mlflow.get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in history] == [5, 10, 15, 20, 25, 30]
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"
    # And once more: nothing is left to do, nothing is doubled.
    again = succeed("train", *TINY, "--name", "first", "--steps", "30")
    assert again["step"] == 30
    assert len(mlflow.get_metric_history(run.info.run_id, "train/loss")) == 6
    assert len(mlflow.search_logged_models([run.info.experiment_id])) == 3

    # Another config under the same name is refused.
    other = run_job("train", *TINY, "--name", "first", "--lr", "0.1")
    assert other.code == 2
    assert "lr was 0.002, now 0.1" in other.stderr


def run_id_of(home: str) -> str:
    """The id of the only run."""
    mlflow = client(home)
    return str(mlflow.search_runs([mlflow.get_experiment_by_name("ddpm").experiment_id])[0].info.run_id)


@pytest.mark.usefixtures("one_cluster")
def test_a_stopped_driver_leaves_a_killed_run_that_the_same_command_finishes(home: str) -> None:
    words = [sys.executable, "jobs/train.py", *TINY, "--name", "stopped", "--steps", "100000", "--json"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 400
        checkpoints = Path(home) / "runs" / "stopped"
        while not list(checkpoints.glob("samples/*.png")):
            assert time.monotonic() < deadline, "no checkpoint was published"
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert '"exit_code": 130' in stdout
    assert "interrupted; run stopped is saved up to step " in stderr
    assert f"continue with: {sys.executable} jobs/train.py " in stderr
    assert f"/runs/{run_id_of(home)}?" in stderr.partition("step ")[0], "the link comes before the first step"
    mlflow = client(home)
    experiment = mlflow.get_experiment_by_name("ddpm")
    run = mlflow.search_runs([experiment.experiment_id])[0]
    assert run.info.status == "KILLED"
    last = max(m.step for m in mlflow.get_metric_history(run.info.run_id, "train/loss"))
    result = succeed("train", *TINY, "--name", "stopped", "--steps", str(last + 10))
    assert result["run_id"] == run.info.run_id
    steps = [m.step for m in mlflow.get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps))
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_driver_that_is_killed_loses_no_record_and_doubles_none(home: str) -> None:
    words = [sys.executable, "jobs/train.py", *TINY, "--name", "shot", "--steps", "100000"]
    spool = Path(home) / "spool"
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 400
        while not list((Path(home) / "runs" / "shot").glob("samples/*.png")):
            assert time.monotonic() < deadline, "no checkpoint was published"
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.5)
        cluster_of_job = psutil.Process(job.pid).children(recursive=True)
        job.kill()
    # Its workers take further steps until they notice.
    _, alive = psutil.wait_procs(cluster_of_job, timeout=400)
    assert alive == []
    mlflow = client(home)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("ddpm").experiment_id])
    assert run.info.status == "RUNNING"
    (file,) = spool.glob("shot-*/1/records.jsonl")
    reached = json.loads(file.read_text().splitlines()[-2])["step"] // 10 * 10 + 20
    result = succeed("train", *TINY, "--name", "shot", "--steps", str(reached))
    assert result["run_id"] == run.info.run_id
    steps = [m.step for m in mlflow.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(5, reached + 1, 5))
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"
    assert not list(spool.glob("*"))


@pytest.mark.usefixtures("one_cluster")
def test_a_diverging_run_fails_with_the_step_in_one_line(home: str) -> None:
    words = ["--name", "wild", "--lr", "1e30", "--lr-warmup-steps", "1", "--grad-clip", "0", "--max-failures", "0"]
    done = run_job("train", *TINY, *words)
    assert done.code == 1
    assert "not finite at step" in done.stderr
    assert "Traceback" not in done.stderr
    mlflow = client(home)
    run = mlflow.search_runs([mlflow.get_experiment_by_name("ddpm").experiment_id])[0]
    assert run.info.status == "FAILED"


@pytest.fixture
def ray_head(home: str) -> Iterator[dict[str, str]]:
    """A Ray head with a dashboard and token authentication; the environment of its clients."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths are short
    ports = []
    probes = [socket.socket() for _ in range(3)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
        ports.append(probe.getsockname()[1])
    for probe in probes:
        probe.close()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the job's "python" is the head's
    }
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    start = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={ports[0]}", "--num-cpus=2"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", f"--temp-dir={folder}"]
    # Two clusters on one machine would want the same port for their agents, and one of them would take no jobs.
    start += [f"--dashboard-agent-listen-port={ports[2]}"]
    start += ["--object-store-memory=200000000", "--disable-usage-stats"]
    with subprocess.Popen(
        [*ray, *start], env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as head:
        deadline = time.monotonic() + 400
        while not _answers(ports[1]):
            assert time.monotonic() < deadline, "the head's dashboard did not come up"
            assert head.poll() is None
            time.sleep(0.5)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
        head.terminate()
        head.wait(300)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_submitted_job_succeeds_and_a_plain_run_sees_its_run(home: str, ray_head: dict[str, str]) -> None:
    ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    variables = json.dumps({"env_vars": {"DDPM_HOME": home}})
    job = [
        "job",
        "submit",
        "--working-dir",
        ".",
        "--runtime-env-json",
        variables,
        "--",
        "python",
        "jobs/train.py",
        *TINY,
        "--name",
        "submitted",
    ]
    deadline = time.monotonic() + 400
    while True:
        done = subprocess.run(
            [*ray, *job],
            cwd=ROOT,
            env={**os.environ, **ray_head},
            capture_output=True,
            text=True,
            timeout=400,
        )
        # A node takes no jobs until its agent has registered, some seconds after Ray says that it is up.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    mlflow = client(home)
    run = mlflow.search_runs([mlflow.get_experiment_by_name("ddpm").experiment_id])[0]
    assert (run.info.run_name, run.info.status) == ("submitted", "FINISHED")
    # The plain command, on a cluster of its own, goes on with the submitted run.
    more = succeed("train", *TINY, "--name", "submitted", "--steps", "30")
    assert (more["run_id"], more["step"]) == (run.info.run_id, 30)

    refused = subprocess.run(
        [*ray, *job],
        cwd=ROOT,
        env={**os.environ, **ray_head, "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert refused.returncode != 0
