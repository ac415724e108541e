"""MLflow, PostgreSQL and an S3 store as plain processes on this machine: ``python infra/services up``.

The same ports, users and bucket as ``infra/compose``, without a container engine. Data and secrets stay in one folder.
"""

import argparse
import fcntl
import ipaddress
import os
import sys
import urllib.error
from pathlib import Path

import logins
import migration
import mlflow_server
import mlflow_users
import postgres
import seaweedfs
from daemon import Daemon
from errors import ServiceError
from programs import Programs, find_programs
from settings import LOGINS, SECRETS, Ports, Settings, default_folder


def up(settings: Settings, *, stores_only: bool) -> None:
    """Starts what does not run, or not with these secrets, in the order in which one needs the other."""
    programs = find_programs()
    postgres.prepare(settings, programs)
    database = postgres.daemon(settings, programs)
    _start(database)
    postgres.ensure_password(settings, programs, database)
    postgres.create_databases(settings, programs)
    seaweedfs.prepare(settings)
    _start(seaweedfs.daemon(settings, programs))
    settings.write_environments()
    if stores_only:
        print(f"PostgreSQL and S3 {settings.s3_uri}; source {settings.folder / 'admin.env'}")
        return
    server = mlflow_server.daemon(settings)
    if not server.is_current():
        server.stop()
        logins.set_passwords(settings)
    _start(server)
    _create_users(settings)
    print(f"MLflow {settings.mlflow_uri}, S3 {settings.s3_uri}, data and secrets in {settings.folder}")
    for user, can in {"writer": "train and evaluate", "reader": "look", "admin": "manage users, back up"}.items():
        print(f"  source {settings.folder / f'{user}.env'}    # {can}")


def _create_users(settings: Settings) -> None:
    login = (LOGINS["admin"], settings.secrets["mlflow_admin_password"])
    for user in ("writer", "reader"):
        name, password = LOGINS[user], settings.secrets[f"mlflow_{user}_password"]
        try:
            mlflow_users.ensure_user(settings.mlflow_uri, login, name, password)
        except urllib.error.URLError as error:
            raise ServiceError(f"MLflow refuses the user {name}: {error}") from error


def rotate(settings: Settings, what: str) -> None:
    """Makes other secrets in place of some and brings them to the servers; the old ones are refused from then on."""
    find_programs()  # or nothing changes
    settings.renew(what)
    up(settings, stores_only=False)
    print(f"new: {what}; source the files above again, and start jobs that used the old ones again")


def upgrade(settings: Settings) -> None:
    """Brings MLflow's databases to the installed version, and starts everything."""
    mlflow_server.daemon(settings).stop()
    up(settings, stores_only=True)
    for line in migration.upgrade(settings):
        print(line, flush=True)
    up(settings, stores_only=False)


def down(settings: Settings) -> None:
    """Ends what ``up`` started; data stays."""
    programs = find_programs()
    for daemon in _daemons(settings, programs):
        print(f"{daemon.name}: {'ended' if daemon.stop() else 'was not running'}")
    seaweedfs.remove_sockets(settings)


def status(settings: Settings) -> None:
    """Says of each server whether it runs and answers."""
    for daemon in _daemons(settings, find_programs()):
        pid = daemon.pid()
        state = "not running" if pid is None else f"process {pid}, {'ready' if daemon.ready() else 'not ready'}"
        print(f"{daemon.name}: {state}")


def _daemons(settings: Settings, programs: Programs) -> list[Daemon]:
    return [
        mlflow_server.daemon(settings),
        seaweedfs.daemon(settings, programs),
        postgres.daemon(settings, programs),
    ]


def _start(daemon: Daemon) -> None:
    print(f"{daemon.name}: {'started' if daemon.start() else 'was running'}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python infra/services", description=__doc__)
    parser.add_argument("verb", choices=("up", "down", "status", "rotate", "upgrade"))
    parser.add_argument("what", nargs="?", choices=(*SECRETS, "all"), help="which secrets to rotate")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="data and secrets (default: %(default)s)")
    parser.add_argument(
        "--bind", default="127.0.0.1", help="address that MLflow and S3 listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--trust-network", action="store_true", help="allow a --bind that others reach: no key guards inner ports"
    )
    parser.add_argument("--stores-only", action="store_true", help="up without MLflow, to restore a back-up")
    for name, default in vars(Ports()).items():
        parser.add_argument(f"--{name}-port", type=int, default=default, help="(default: %(default)s)")
    return parser


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def main(argv: list[str]) -> int:
    """Runs one verb; two at a time wait for each other."""
    parser = _parser()
    given = parser.parse_intermixed_args(argv)
    if (given.verb == "rotate") != (given.what is not None):
        parser.error(f"rotate takes what to replace, other verbs take nothing: {', '.join(SECRETS)} or all")
    if not given.trust_network and not _is_loopback(given.bind):
        parser.error(
            f"--bind {given.bind}: SeaweedFS's inner ports ask nobody for a key; add --trust-network if only machines "
            "that may read and write everything reach this address"
        )
    ports = Ports(mlflow=given.mlflow_port, s3=given.s3_port, postgres=given.postgres_port)
    settings = Settings(folder=given.folder.resolve(), bind=given.bind, ports=ports)
    os.umask(0o077)
    try:
        if not settings.folder.exists():
            settings.folder.mkdir(parents=True)
            settings.folder.chmod(0o711)  # the user postgres passes through; what lies here is private
        with (settings.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if given.verb == "up":
                up(settings, stores_only=given.stores_only)
            elif given.verb == "rotate":
                rotate(settings, given.what)
            else:
                {"down": down, "status": status, "upgrade": upgrade}[given.verb](settings)
    except (ServiceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
