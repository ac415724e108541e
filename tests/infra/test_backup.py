"""``infra/backup`` against a real S3 server: what a copy holds while a run goes on, and which keys it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from infra_files import INFRA, ROOT
from servers import S3Server

pytestmark = pytest.mark.slow

BUCKET = "backed-up"
HEAD = """
import json, pathlib, sys
sys.path.insert(0, "infra/backup")
import bucket, runs
from errors import BackupError
store, folder = bucket.Bucket.of_environment(), pathlib.Path(sys.argv[1]) / "s3"
"""
COMMIT = """
import hashlib
def commit(step, *, keep):
    put = lambda key, data: store.client.put_object(Bucket=store.name, Key="home/runs/live/" + key, Body=data)
    weights = str(step).encode() * 1000
    put(f"step-{step}/model.bin", weights)
    put(f"step-{step}/meta.json", json.dumps({"files": {"model.bin": hashlib.sha256(weights).hexdigest()}}))
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": f"step-{number}"} for number in keep]}
    put("checkpoint_manager_snapshot.json", json.dumps(snapshot))
    for key in [entry.key for entry in store.objects("home/runs/live/step-")]:
        if int(key.split("/")[3].removeprefix("step-")) not in keep:
            store.client.delete_object(Bucket=store.name, Key=key)
"""


@pytest.fixture
def client(s3: S3Server) -> Any:
    """A client of an empty bucket."""
    keys = s3.admin
    found = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name="us-east-1",
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
    )
    found.create_bucket(Bucket=BUCKET)
    yield found
    for entry in found.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        found.delete_object(Bucket=BUCKET, Key=entry["Key"])
    found.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def python(client: Any, s3: S3Server) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs the modules of ``infra/backup``, whose names others have as well, in a process of their own."""
    environment = {**os.environ, **s3.environment(), "DDPM_HOME": f"s3://{BUCKET}/home"}

    def run(*words: object, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=120)

    return run


def test_a_run_that_commits_and_deletes_while_it_is_copied_is_whole_in_the_copy(python: Any, tmp_path: Path) -> None:
    live = """
commit(1, keep=[1])
download, steps = store.client.download_file, iter([2, 3])
def meanwhile(bucket, key, path):
    if key.endswith(("step-1/meta.json", "step-2/meta.json")) and (step := next(steps, None)):
        commit(step, keep=[step])
    download(bucket, key, path)
store.client.download_file = meanwhile
print(json.dumps(runs.save(store, folder)))
"""
    done = python("-c", HEAD + COMMIT + live, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    copy = tmp_path / "s3/home/runs/live"
    named = json.loads((copy / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    assert named == [{"checkpoint_dir_name": "step-3"}]
    assert (copy / "step-3/model.bin").read_text() == "3" * 1000
    files = {entry["path"] for entry in json.loads(done.stdout)}
    assert {path.relative_to(tmp_path).as_posix() for path in copy.rglob("*") if path.is_file()} == files


def test_a_checkpoint_that_is_damaged_in_the_bucket_is_a_warning_and_stops_nothing(python: Any, tmp_path: Path) -> None:
    damaged = """
commit(1, keep=[1])
commit(2, keep=[1, 2])
store.client.put_object(Bucket=store.name, Key="home/runs/live/step-2/model.bin", Body=b"damage")
print(len(runs.save(store, folder)))
"""
    done = python("-c", HEAD + COMMIT + damaged, tmp_path)
    assert (done.returncode, done.stdout) == (0, "5\n")
    assert done.stderr == f"warning: home/runs/live/step-2 is not whole in s3://{BUCKET}\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["../../planted"], "is no name of a file"),
        (["/tmp/planted"], "is no name of a file"),
        (["home//twice"], "is no name of a file"),
        (["home/a", "home/a/b"], "an object and a folder at once"),
        (["home/a/b", "home/a"], "an object and a folder at once"),
    ],
)
def test_a_key_that_is_no_file_of_its_own_in_the_folder_is_refused(
    keys: list[str], message: str, python: Any, tmp_path: Path
) -> None:
    # Servers that keep objects as files refuse some of these keys; others take every one.
    refused = f"""
try:
    store.save(folder, [bucket.Object(key=key, etag="") for key in {keys!r}])
except BackupError as error:
    print(error)
"""
    answers = "store.client.download_file = lambda bucket, key, path: pathlib.Path(path).write_bytes(b'planted')\n"
    done = python("-c", HEAD + answers + refused, tmp_path / "copy")
    assert message in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.rglob("planted"))
    assert not Path("/tmp/planted").exists()


@pytest.fixture
def postgres_programs(tmp_path: Path) -> Path:
    """Stand-ins that take every dump; PostgreSQL itself is in ``test_services_end_to_end.py``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("pg_dump", "pg_restore", "createdb", "dropdb"):
        (folder / name).write_text("#!/bin/sh\necho dump\n")
        (folder / name).chmod(0o700)
    # ``docker compose --file=F exec -T --env=PGUSER=mlflow postgres PROGRAM ...``
    (folder / "docker").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nshift 6\nexec {folder}/"$@"\n')
    (folder / "docker").chmod(0o700)
    return folder


def test_a_restore_that_broke_off_goes_on_and_foreign_objects_are_refused(
    client: Any, python: Any, postgres_programs: Path, tmp_path: Path
) -> None:
    path = {"PATH": f"{postgres_programs}:{os.environ['PATH']}"}
    for key in ("home/data/a", "home/data/b", "mlflow/1/c"):
        client.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    saved = python("infra/backup", "save", tmp_path / "copy", **path)
    assert saved.stdout.startswith("3 objects and 2 databases"), saved.stderr
    client.delete_object(Bucket=BUCKET, Key="home/data/b")  # as if a restore had come to the first object
    client.delete_object(Bucket=BUCKET, Key="mlflow/1/c")
    again = python("infra/backup", "restore", tmp_path / "copy", **path)
    assert again.stdout.startswith("restored 3 objects"), again.stderr
    assert client.get_object(Bucket=BUCKET, Key="mlflow/1/c")["Body"].read() == b"mlflow/1/c"
    for key in ("home/data/a", "home/foreign"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"other")
        refused = python("infra/backup", "restore", tmp_path / "copy", **path)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert f"holds {key}, not of this back-up" in refused.stderr
        client.delete_object(Bucket=BUCKET, Key=key)


def test_with_compose_the_containers_own_programs_make_and_take_the_dumps(
    client: Any, python: Any, postgres_programs: Path, tmp_path: Path
) -> None:
    path = {"PATH": f"{postgres_programs}:{os.environ['PATH']}"}
    words = ["--compose", str(INFRA / "compose" / "compose.yaml")]
    assert python("infra/backup", "save", tmp_path / "copy", *words, **path).returncode == 0
    assert (tmp_path / "copy/postgres/mlflow_auth.dump").read_text() == "dump\n"
    assert python("infra/backup", "restore", tmp_path / "copy", *words, **path).returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    service = f"compose --file={words[1]} exec -T --env=PGUSER=mlflow postgres "
    assert all(line.startswith(service) for line in asked)
    programs = [line.removeprefix(service).split()[0] for line in asked]
    assert programs == ["pg_dump"] * 2 + ["dropdb", "createdb", "pg_restore"] * 2


def test_a_manifest_cannot_make_a_restore_read_files_outside_of_the_back_up(python: Any, tmp_path: Path) -> None:
    entry = {"path": "s3/../../outside", "num_bytes": 1, "sha256": "0"}
    (tmp_path / "copy").mkdir()
    shutil.copy(__file__, tmp_path / "outside")
    (tmp_path / "copy/backup.json").write_text(json.dumps({"bucket": BUCKET, "time": "now", "files": [entry]}))
    done = python("infra/backup", "restore", tmp_path / "copy")
    assert done.returncode == 1
    assert "is no name of a file" in done.stderr
