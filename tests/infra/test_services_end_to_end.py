"""Training, evaluation, back-up and restore against the services: ``http://``, ``s3://``, two users' logins."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import cluster
from mlflow import MlflowClient
from runner import ROOT, TINY, run_job, succeed
from services import Services, services, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RUN = "services"
FEW_IMAGES = ["--num-images", "64", "--sampling-steps", "5", "--chunk-size", "32"]


@dataclass(frozen=True, kw_only=True)
class SetUp:
    """Services, a cluster whose nodes have the writer's credentials, and a run of 20 steps."""

    services: Services
    writer: dict[str, str]
    """The environment of a person who may write."""
    reader: dict[str, str]
    """The environment of a person who may read, with a home of their own and no cluster."""

    def mlflow(self, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.setenv(name, self.reader[name])
        return MlflowClient(self.reader["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetUp]:
    if reason := why_not():
        pytest.skip(reason)
    with services() as running, pytest.MonkeyPatch.context() as patch:
        writer = running.environment("writer")
        for name, value in writer.items():
            if name.startswith(("AWS_", "MLFLOW_TRACKING_")):
                patch.setenv(name, value)  # what nodes of a cluster get from their role and from a Secret
        with cluster(head_cpus=2) as nodes:
            writer |= nodes.environment
            succeed("prepare_data", **writer)
            train(writer, steps=20)
            home = tmp_path_factory.mktemp("reader-home")
            yield SetUp(
                services=running, writer=writer, reader={**running.environment("reader"), "DDPM_HOME": str(home)}
            )


def train(environment: dict[str, str], *, steps: int) -> dict[str, Any]:
    return succeed("train", *TINY, "--quality-images", "0", "--name", RUN, "--steps", str(steps), **environment)


def loss_steps(client: MlflowClient) -> list[int]:
    """Steps whose loss MLflow has, as often as it has them."""
    experiment = client.get_experiment_by_name("ddpm").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{RUN}'")
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def tick(environment: dict[str, str], *words: str) -> str:
    """One tick of the schedule, by the schedule's own entrypoint."""
    done = subprocess.run(
        [str(ROOT / "infra/schedules/evaluate.sh"), *words],
        env={**os.environ, **environment, "DDPM_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_trained_through_http_and_s3_is_evaluated_by_the_schedule_once(
    setup: SetUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = setup.services.folder / "writer.env"  # like /etc/ddpm/ddpm.env of a machine with a schedule
    schedule = {name: setup.writer[name] for name in setup.writer if name.startswith("RAY_")}
    schedule |= {"DDPM_ENV_FILE": str(settings), "DDPM_LOCK": str(tmp_path / "lock")}
    first = tick(schedule, *FEW_IMAGES)
    assert f"{RUN} step 20: fd_efficientnet_lite0 " in first
    assert "champion of ddpm: version 1" in first
    assert "nothing to do" in tick(schedule, *FEW_IMAGES)
    found = succeed("doctor", **setup.writer)["findings"]
    assert {finding["check"] for finding in found if finding["state"] == "ok"} >= {"storage", "mlflow", "clock", "ray"}
    client = setup.mlflow(monkeypatch)
    assert loss_steps(client) == [5, 10, 15, 20]
    experiment = client.get_experiment_by_name("ddpm").experiment_id
    (model,) = client.search_logged_models([experiment], "tags.`step` = '20'")
    assert [metric.key for metric in model.metrics if metric.key.startswith("fd_")] == ["fd_efficientnet_lite0"]


def test_a_sweep_leaves_its_trials_and_its_table_on_the_servers(setup: SetUp, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, "--quality-images", "0", "--num-images", "20", "--chunk-size", "20", "--num-workers", "1"]
    result = succeed(
        "tune", *words, "--schedules", "linear", "cosine", "--Ts", "100", "--name", "swept", **setup.writer
    )
    assert {trial["status"] for trial in result["trials"]} == {"finished"}
    client = setup.mlflow(monkeypatch)
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.info.artifact_uri.startswith("mlflow-artifacts:/")
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    seen = {(run.info.run_name, run.info.status, run.data.metrics["fd_efficientnet_lite0"]) for run in children}
    assert seen == {(trial["run"], "FINISHED", trial["value"]) for trial in result["trials"]}
    for name, value in setup.reader.items():
        monkeypatch.setenv(name, value)  # by the server, which keeps artifacts in S3
    assert all(trial["run"] in mlflow_text(client, parent.info.run_id, "sweep.csv") for trial in result["trials"])


def mlflow_text(client: MlflowClient, run_id: str, name: str) -> str:
    return Path(client.download_artifacts(run_id, name)).read_text()


def test_the_reader_may_measure_what_is_stored_but_writes_nothing(
    setup: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = setup.writer["DDPM_HOME"]
    model = f"{home}/runs/{RUN}/step-00000020"
    words = ["--checkpoint", model, "--reference", f"{home}/data/digits", *FEW_IMAGES]
    (result,) = succeed("evaluate", *words, **setup.reader)["evaluated"]
    assert result["step"] == 20
    refused_by_mlflow = run_job("train", *TINY, "--name", "mine", **{**setup.reader, "DDPM_HOME": home})
    refused_by_s3 = run_job("prepare_data", "--data", "mine", **{**setup.reader, "DDPM_HOME": home})
    for done, words in ((refused_by_mlflow, "Permission denied"), (refused_by_s3, "AccessDenied")):
        assert done.code == 1
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert words in line
        assert not any(value in done.stderr for name, value in setup.reader.items() if "SECRET" in name)
    assert loss_steps(setup.mlflow(monkeypatch)) == [5, 10, 15, 20]


def test_starting_again_changes_nothing_and_secrets_are_private_and_not_printed(setup: SetUp) -> None:
    folder = setup.services.folder
    before = (folder / "secrets.json").read_text()
    printed = setup.services.run("up")
    assert printed.count("was running") == 3
    assert (folder / "secrets.json").read_text() == before
    secrets = [value for user in ("writer", "reader", "admin") for value in secret_values(setup.services, user)]
    assert secrets
    assert not any(value in printed for value in secrets)
    for name in ("secrets.json", "writer.env", "reader.env", "admin.env", "s3-users.json", "mlflow-auth.ini"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert any("mlflow server" in command for command in commands)
    assert not any(value in command for value in secrets for command in commands)


def test_after_a_wipe_the_back_up_is_restored_and_the_run_goes_on_by_its_name(
    setup: SetUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backup"
    admin = setup.services.environment("admin")
    back_up("save", folder, admin)
    setup.services.run("down")
    for name in ("postgres", "seaweedfs"):
        shutil.rmtree(setup.services.folder / name)
    setup.services.run("up", "--stores-only")
    back_up("restore", folder, admin)
    setup.services.run("up")
    train(setup.writer, steps=40)
    assert loss_steps(setup.mlflow(monkeypatch)) == [5, 10, 15, 20, 25, 30, 35, 40]


def back_up(verb: str, folder: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "infra/backup", verb, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr


def secret_values(services: Services, user: str) -> list[str]:
    return [value for name, value in services.environment(user).items() if "SECRET" in name or "PASSWORD" in name]
