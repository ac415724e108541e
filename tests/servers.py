"""Real servers for tests, each a child process on free loopback ports with its data in a temporary folder."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3

from pipeline import storage

GRPC_OFFSET = 10_000
"""SeaweedFS puts the gRPC port of every component this far above its HTTP port."""

_SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Keys of one S3 user."""

    access_key: str
    secret_key: str


class ServerProcess:
    """A server in a session of its own, so that its children end with it and nobody else does."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        ready: str,
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._log = log
        self._ready = ready
        self._seconds = seconds
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Starts it, a second time over the data of the first, and waits until it is ready unless told otherwise."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                cwd=self._log.parent,
                start_new_session=True,
            )
        if wait:
            _wait_until_ready(self._process, self._ready, self._seconds, self._log)

    def kill(self) -> None:
        """Ends it and its children with SIGKILL, if it runs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A SeaweedFS with an administrator and a user who may only read."""

    endpoint: str
    admin: Credentials
    reader: Credentials
    process: ServerProcess | None = None
    """What runs it; none if it is only an address."""

    def environment(self, user: Credentials | None = None) -> dict[str, str]:
        """What a process needs in its environment to reach the server, as the administrator unless told otherwise."""
        user = user or self.admin
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": user.access_key,
            "AWS_SECRET_ACCESS_KEY": user.secret_key,
        }

    def kill(self) -> None:
        """Ends the server like a power cut. Only for a server that no other test uses."""
        assert self.process is not None
        self.process.kill()

    def start(self, *, wait: bool = True) -> None:
        """Starts it again on the same ports and data."""
        assert self.process is not None
        self.process.start(wait=wait)


def find_program(name: str) -> str | None:
    """A program of this virtual environment, else one on the PATH."""
    beside = _SCRIPTS / name
    return str(beside) if beside.exists() else shutil.which(name)


def forget_s3_client() -> None:
    """Makes the next access to S3 read the environment again; boto3 keeps credentials in its default session."""
    storage._s3_of_process.cache_clear()
    boto3.DEFAULT_SESSION = None


@contextmanager
def seaweedfs(program: str, folder: Path) -> Iterator[S3Server]:
    """Runs SeaweedFS: ready after about a second, killed at the end (it loses nothing that it acknowledged)."""
    s3, master, volume, filer, admin = _free_ports(5, offsets=(0, GRPC_OFFSET))
    users = {
        "admin": Credentials(access_key="admin-key", secret_key="admin-secret-0123456789"),
        "reader": Credentials(access_key="reader-key", secret_key="reader-secret-0123456789"),
    }
    actions = {"admin": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": keys.access_key, "secretKey": keys.secret_key}],
            "actions": actions[name],
        }
        for name, keys in users.items()
    ]
    (folder / "data").mkdir()
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    command = [
        program, "-logtostderr", "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-admin.port={admin}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
        # A bucket takes volumes of its own, and the default number, which follows the free disk space, is soon used up.
        "-volume.max=10000", "-master.volumeSizeLimitMB=64",
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{s3}"
    try:
        process = ServerProcess(command, log=folder / "seaweedfs.log", ready=f"{endpoint}/healthz", seconds=120)
        with _running(process):
            yield S3Server(endpoint=endpoint, admin=users["admin"], reader=users["reader"], process=process)
    finally:
        ports = (s3, filer, volume, master, admin)
        for port in (*ports, *(port + GRPC_OFFSET for port in ports)):
            for left_behind in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_behind.unlink(missing_ok=True)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Runs an MLflow server over sqlite that keeps the artifacts itself; yields its URI. Ready after 5 to 20 s."""
    with mlflow_process(folder) as (uri, _):
        yield uri


@contextmanager
def mlflow_process(
    folder: Path, *, artifacts: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, ServerProcess]]:
    """Like ``mlflow_server``; yields its process as well, to kill it and start it again on the same port and data."""
    (port,) = _free_ports(1, offsets=(0,))
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", artifacts or str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **(environment or {})}
    log = folder / "mlflow.log"
    process = ServerProcess(command, log=log, ready=f"{uri}/health", seconds=300, environment=quiet)
    with _running(process):
        yield uri, process


@contextmanager
def postgres(programs: Path, folder: Path) -> Iterator[str]:
    """Runs PostgreSQL with an empty database; yields its SQLAlchemy URI. Ready after about two seconds.

    PostgreSQL refuses to run as root; root starts it as the user postgres, in a folder of that user.
    """
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp", ignore_cleanup_errors=True) as name:
        data, (port,) = Path(name) / "data", _free_ports(1, offsets=(0,))
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        if user:
            shutil.chown(name, "postgres", "postgres")
        init = [*user, str(programs / "initdb"), "-D", str(data), "-U", "mlflow", "-A", "trust", "--no-sync"]
        subprocess.run(init, check=True, capture_output=True, cwd=name)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        command = [*user, str(programs / "postgres"), "-D", str(data), "-p", str(port), *options]
        with (folder / "postgres.log").open("ab") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=name, start_new_session=True)
        try:
            create = [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
            for _ in range(100):
                if subprocess.run(create, capture_output=True, cwd=name).returncode == 0:
                    break
                time.sleep(0.1)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
        finally:
            os.killpg(server.pid, signal.SIGQUIT)  # at once
            server.wait()


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs, of a Debian package or on the PATH."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    on_path = shutil.which("initdb")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


@contextmanager
def _running(process: ServerProcess) -> Iterator[None]:
    try:
        process.start()
        yield
    finally:
        process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"{url} did not answer within {seconds} s:\n{log.read_text()[-2000:]}")


def _free_ports(count: int, *, offsets: Sequence[int]) -> list[int]:
    """Ports that are free together with those at the given offsets, below the range that the kernel hands out."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(15_000, 22_000), 500):
        if all(_is_free(port + offset) for offset in offsets):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
