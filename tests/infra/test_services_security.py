"""What each login and key of the services may not do, and that a replaced one is refused: real servers."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import psycopg2
import pytest
import requests
from botocore.config import Config
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from services import ROOT, Services, services, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

VICTIM = "home/runs/victim/ema.safetensors"


@pytest.fixture(scope="module")
def running() -> Iterator[Services]:
    if reason := why_not():
        pytest.skip(reason)
    with services() as found:
        s3(found.environment("writer")).put_object(Bucket="ddpm", Key=VICTIM, Body=b"weights")
        yield found


def s3(environment: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def keys(running: Services) -> list[str]:
    pages = s3(running.environment("writer")).get_paginator("list_objects_v2").paginate(Bucket="ddpm")
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def call(environment: dict[str, str], method: str, path: str, **more: Any) -> requests.Response:
    login = (environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"])
    return requests.request(method, f"{environment['MLFLOW_TRACKING_URI']}/{path}", auth=login, timeout=400, **more)


def experiment(environment: dict[str, str], location: str | None = None) -> str:
    body = {"name": f"mine-{location}"} | ({"artifact_location": location} if location else {})
    answer = call(environment, "POST", "api/2.0/mlflow/experiments/create", json=body)
    return str(answer.json().get("experiment_id", ""))


def run_in(environment: dict[str, str], experiment_id: str) -> str:
    answer = call(environment, "POST", "api/2.0/mlflow/runs/create", json={"experiment_id": experiment_id})
    return str(answer.json()["run"]["info"]["run_id"])


def upload(environment: dict[str, str], run_id: str) -> requests.Response:
    path = f"ajax-api/2.0/mlflow/upload-artifact?run_uuid={run_id}&path=planted.txt"
    return call(environment, "POST", path, data=b"planted", headers={"Content-Type": "text/plain"})


@pytest.mark.parametrize("user", ["reader", "writer"])
def test_through_mlflows_server_nobody_writes_outside_its_prefix(running: Services, user: str) -> None:
    environment = running.environment(user)
    before = keys(running)
    outside = experiment(environment, "s3://ddpm/home/runs/" + user)
    assert not upload(environment, run_in(environment, outside)).ok
    assert keys(running) == before
    if user == "writer":  # the same request is one that the server does grant inside of it
        inside = experiment(environment, "s3://ddpm/mlflow/elsewhere")
        assert upload(environment, run_in(environment, inside)).ok
        assert keys(running) == sorted([*before, "mlflow/elsewhere/" + keys(running)[-1].split("/", 2)[-1]])


@pytest.mark.parametrize("user", ["reader", "writer"])
def test_through_mlflows_server_nobody_reads_outside_its_prefix(running: Services, user: str) -> None:
    environment = running.environment(user)
    call(environment, "POST", "api/2.0/mlflow/registered-models/create", json={"name": user})
    body = {"name": user, "source": "s3://ddpm/home/runs/victim"}
    made = call(environment, "POST", "api/2.0/mlflow/model-versions/create", json=body).json()
    version = made.get("model_version", {}).get("version", "1")
    path = f"model-versions/get-artifact?name={user}&version={version}&path=ema.safetensors"
    answer = call(environment, "GET", path)
    assert not answer.ok
    assert b"weights" not in answer.content


def test_artifacts_of_the_default_place_go_through_the_server_as_before(
    running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in running.environment("writer").items():
        monkeypatch.setenv(name, value)
    client = MlflowClient()
    run_id = client.create_run(client.create_experiment("plain")).info.run_id
    client.log_text(run_id, "twelve", "deep/er/number.txt")
    assert [entry.path for entry in client.list_artifacts(run_id, "deep/er")] == ["deep/er/number.txt"]
    found = [key for key in keys(running) if key.endswith(f"{run_id}/artifacts/deep/er/number.txt")]
    assert len(found) == 1, keys(running)


def status(port: int, path: str, method: str = "GET") -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method, data=b"x" * (method != "GET"))
    request.add_header("Origin", "http://foreign.example")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_seaweedfs_inner_ports_give_and_take_nothing_over_http(running: Services) -> None:
    first = int(running.environment("writer")["AWS_ENDPOINT_URL"].rpartition(":")[2])
    master, volume, filer, admin = range(first + 1, first + 5)
    for path in ("/", "/buckets/ddpm/", f"/buckets/ddpm/{VICTIM}"):
        for port in (filer, admin):
            assert status(port, path) == status(port, path, "POST") == 404
    for path in ("/dir/assign", "/dir/lookup?volumeId=1", "/vol/status", "/submit", "/col/delete?collection=ddpm"):
        assert status(master, path) == 404
    for number in range(1, 8):  # whether there is such a volume or not
        for method in ("GET", "POST", "DELETE"):
            assert status(volume, f"/{number},018546c2bb", method) == 401
    assert status(volume, "/ui/index.html") == 401


def test_an_address_that_others_reach_is_refused_unless_somebody_says_so(running: Services) -> None:
    running.words.remove("--trust-network")
    done = running.try_run("up", "--bind", "0.0.0.0")
    assert done.returncode == 2
    assert "--trust-network" in done.stderr.splitlines()[-1]


def logs_in(environment: dict[str, str]) -> bool:
    return call(environment, "GET", "api/2.0/mlflow/experiments/get?experiment_id=0").ok


def reads_s3(environment: dict[str, str]) -> bool:
    try:
        return bool(s3(environment).get_object(Bucket="ddpm", Key=VICTIM)["Body"].read() == b"weights")
    except ClientError:
        return False


def reads_records(environment: dict[str, str]) -> bool:
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD"}
    try:
        psycopg2.connect(dbname="mlflow", **{key: environment[name] for key, name in names.items()}).close()
    except psycopg2.OperationalError:
        return False
    return True


def test_the_administrators_password_is_changed_by_the_script_that_compose_has_too(running: Services) -> None:
    admin = running.environment("admin")
    environment = {**os.environ, **admin, "ADMIN_PASSWORD": "another-password-of-the-administrator"}
    command = [sys.executable, "infra/services/mlflow_users.py", "admin"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400)
    assert logs_in({**admin, "MLFLOW_TRACKING_PASSWORD": environment["ADMIN_PASSWORD"]})


def test_a_replaced_secret_is_refused_and_the_new_one_works(running: Services) -> None:
    users = ("reader", "writer", "admin")
    old = {user: running.environment(user) for user in users}
    printed = running.run("rotate", "all")
    assert printed.count("started") == 2  # SeaweedFS and MLflow; PostgreSQL was, before it got its other password
    new = {user: running.environment(user) for user in users}
    for user in users:
        assert old[user]["AWS_SECRET_ACCESS_KEY"] != new[user]["AWS_SECRET_ACCESS_KEY"]
        assert (logs_in(old[user]), logs_in(new[user])) == (False, True), user
        assert (reads_s3(old[user]), reads_s3(new[user])) == (False, True), user
    assert (reads_records(old["admin"]), reads_records(new["admin"])) == (False, True)
    assert run_in(new["writer"], experiment(new["writer"]))
    assert not any(value in printed for value in new["admin"].values() if len(value) == 48)


def test_secrets_deleted_from_their_file_are_made_anew(running: Services) -> None:
    path = running.folder / "secrets.json"
    old, admin = json.loads(path.read_text()), running.environment("admin")
    gone = {"s3_reader_key", "postgres_password"}
    path.write_text(json.dumps({name: value for name, value in old.items() if name not in gone}))
    reader = running.environment("reader")
    running.run("up", "--stores-only")
    new = json.loads(path.read_text())
    assert {name for name in old if old[name] != new[name]} == gone
    assert (reads_s3(reader), reads_s3(running.environment("reader"))) == (False, True)
    assert (reads_records(admin), reads_records(running.environment("admin"))) == (False, True)


def test_an_upgrade_of_current_databases_changes_nothing(running: Services) -> None:
    printed = running.run("upgrade")
    assert printed.count(", as before") == 2
    assert logs_in(running.environment("writer"))
    assert "mlflow" in printed
    assert not any(value in printed for value in json.loads((running.folder / "secrets.json").read_text()).values())


@pytest.mark.parametrize("words", [["rotate"], ["rotate", "nothing"], ["up", "s3-reader"]])
def test_a_wrong_command_changes_nothing(running: Services, words: list[str]) -> None:
    before = (running.folder / "secrets.json").read_text()
    assert running.try_run(*words).returncode == 2
    assert (running.folder / "secrets.json").read_text() == before
