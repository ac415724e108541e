"""Dumps of MLflow's two databases, with PostgreSQL's own programs, which read PGHOST, PGUSER and the like."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import bucket
from errors import BackupError

NAMES = ("mlflow", "mlflow_auth")
"""Records, and who may log in."""


def save(folder: Path) -> list[dict[str, Any]]:
    """Dumps each database at one moment of it; returns the files."""
    folder.mkdir()
    for name in NAMES:
        _run("pg_dump", "--format=custom", f"--file={_dump(folder, name)}", name)
    return [bucket.describe(folder.parent, _dump(folder, name)) for name in NAMES]


def restore(folder: Path) -> None:
    """Replaces each database by its dump.

    Raises:
        BackupError: Somebody is connected, or PostgreSQL refuses.
    """
    for name in NAMES:
        _run("dropdb", "--if-exists", name)
        _run("createdb", name)
        _run("pg_restore", "--exit-on-error", "--no-owner", f"--dbname={name}", str(_dump(folder, name)))


def _dump(folder: Path, name: str) -> Path:
    return folder / f"{name}.dump"


def _run(program: str, *words: str) -> None:
    path = shutil.which(program)
    if path is None:
        raise BackupError(f"{program} is not installed: apt-get install postgresql-client")
    done = subprocess.run([path, *words], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no word"]
        advice = "; end MLflow first" if "being accessed by other users" in done.stderr else ""
        raise BackupError(f"{program} {words[-1]}: {lines[0]}{advice}")
