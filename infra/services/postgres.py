"""PostgreSQL for MLflow: created once, with a password, on the loopback."""

import shutil
import signal
import subprocess
from pathlib import Path

from daemon import Daemon
from errors import ServiceError
from programs import Programs
from settings import DATABASES, Settings, write_private


def daemon(settings: Settings, programs: Programs) -> Daemon:
    """The server; its data folder is made by ``prepare``."""
    data = _data(settings)
    options = [
        f"-c{name}" for name in ("listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200")
    ]
    return Daemon(
        name="postgres",
        folder=settings.folder,
        command=[
            *programs.as_postgres,
            str(programs.postgres / "postgres"),
            "-D",
            str(data),
            f"-p{settings.ports.postgres}",
            *options,
        ],
        ready=lambda: _program(settings, programs, "pg_isready", "-q", "-d", "postgres").returncode == 0,
        seconds=60,
        stop_signal=signal.SIGINT,  # ends sessions at once, and cleanly
        stop_group=False,
    )


def prepare(settings: Settings, programs: Programs) -> None:
    """Makes the data folder where there is none.

    Raises:
        ServiceError: The folder cannot be used.
    """
    data = _data(settings)
    if (data / "PG_VERSION").exists():
        return
    shutil.rmtree(data, ignore_errors=True)  # of a start that broke off
    data.mkdir()
    password = settings.folder / "postgres-password"
    write_private(password, settings.secrets["postgres_password"])
    try:
        if programs.as_postgres:
            shutil.chown(data, "postgres", "postgres")
            shutil.chown(password, "postgres", "postgres")
        words = ["-D", str(data), "-U", "mlflow", "-A", "scram-sha-256", "-E", "UTF8", f"--pwfile={password}"]
        done = subprocess.run(
            [*programs.as_postgres, str(programs.postgres / "initdb"), *words], capture_output=True, text=True, cwd="/"
        )
    finally:
        password.unlink()
    if done.returncode:
        advice = f"; the user postgres must be able to enter {settings.folder}" if programs.as_postgres else ""
        lines = done.stderr.strip().splitlines() or ["no word"]
        raise ServiceError(f"PostgreSQL cannot be set up in {data}: {lines[0]}{advice}")


def ensure_password(settings: Settings, programs: Programs, server: Daemon) -> None:
    """Gives the databases' user the password of ``secrets.json``, whatever the old one was.

    Raises:
        ServiceError: PostgreSQL refuses it even so.
    """
    if _login(settings, programs).returncode == 0:
        return
    server.stop()
    quoted = settings.secrets["postgres_password"].replace("'", "''")
    alone = [*programs.as_postgres, str(programs.postgres / "postgres"), "--single", "-D", str(_data(settings))]
    sql = f"ALTER ROLE mlflow PASSWORD '{quoted}';\n"  # one user, who needs no password, and no port
    done = subprocess.run([*alone, "postgres"], input=sql, capture_output=True, text=True, cwd="/")
    server.start()
    if done.returncode or (done := _login(settings, programs)).returncode:
        lines = done.stderr.strip().splitlines() or ["no word"]
        raise ServiceError(f"PostgreSQL refuses the password of secrets.json: {lines[-1]}")


def create_databases(settings: Settings, programs: Programs) -> None:
    """Makes the databases that are not there.

    Raises:
        ServiceError: PostgreSQL refuses.
    """
    for name in DATABASES:
        done = _program(settings, programs, "createdb", name)
        if done.returncode and "already exists" not in done.stderr:
            raise ServiceError(f"PostgreSQL refuses the database {name}: {done.stderr.strip()}")


def _login(settings: Settings, programs: Programs) -> "subprocess.CompletedProcess[str]":
    return _program(settings, programs, "psql", "-qX", "--command=SELECT 1", "postgres")


def _program(settings: Settings, programs: Programs, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    connection = ["-h", "127.0.0.1", "-p", str(settings.ports.postgres), "-U", "mlflow"]
    environment = {"PGPASSWORD": settings.secrets["postgres_password"], "LC_ALL": "C"}
    return subprocess.run(
        [str(programs.postgres / name), *connection, *words], capture_output=True, text=True, env=environment
    )


def _data(settings: Settings) -> Path:
    return settings.folder / "postgres"
