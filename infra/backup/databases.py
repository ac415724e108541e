"""Dumps of MLflow's two databases, with PostgreSQL's own programs, which read PGHOST, PGUSER and the like."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bucket
from errors import BackupError

NAMES = ("mlflow", "mlflow_auth")
"""Records, and who may log in."""
_ADVICE = {
    "being accessed by other users": "end MLflow first",
    "server version": "these programs are older than the server: install its version, or give --compose FILE",
}


@dataclass(frozen=True, kw_only=True)
class Databases:
    """PostgreSQL, and where its programs run: here, or in its container, which has them of its own version."""

    compose: Path | None = None

    def save(self, folder: Path) -> list[dict[str, Any]]:
        """Dumps each database at one moment of it; returns the files."""
        folder.mkdir()
        for name in NAMES:
            with _dump(folder, name).open("wb") as file:
                self._run("pg_dump", "--format=custom", name, stdout=file)
        return [bucket.describe(folder.parent, _dump(folder, name)) for name in NAMES]

    def restore(self, folder: Path) -> None:
        """Replaces each database by its dump.

        Raises:
            BackupError: Somebody is connected, or PostgreSQL refuses.
        """
        for name in NAMES:
            self._run("dropdb", "--if-exists", "--maintenance-db=postgres", name)
            self._run("createdb", "--maintenance-db=postgres", name)
            with _dump(folder, name).open("rb") as file:
                self._run("pg_restore", "--exit-on-error", "--no-owner", f"--dbname={name}", stdin=file)

    def _run(self, program: str, *words: str, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.PIPE) -> None:
        command = [program]
        if self.compose is not None:
            # Over the container's own socket, which asks the user of its databases for no password.
            words = (
                "compose",
                f"--file={self.compose}",
                "exec",
                "-T",
                "--env=PGUSER=mlflow",
                "postgres",
                program,
                *words,
            )
            command = ["docker"]
        path = shutil.which(command[0])
        if path is None:
            advice = "" if self.compose else ": apt-get install postgresql-client"
            raise BackupError(f"{command[0]} is not installed{advice}")
        done = subprocess.run([path, *words], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
        if done.returncode:
            said = done.stderr.decode(errors="replace")
            line = next((line for line in said.splitlines() if line.strip()), "no word")
            advice = "".join(f"; {text}" for words_of_it, text in _ADVICE.items() if words_of_it in said)
            raise BackupError(f"{program} {words[-1]}: {line}{advice}")


def _dump(folder: Path, name: str) -> Path:
    return folder / f"{name}.dump"
