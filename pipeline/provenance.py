"""Which code made a result: commit, source digest and library versions. Knows nobody."""

import functools
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["code_record"]

_LIBRARIES = ("ray", "torch", "numpy", "mlflow", "webdataset", "pillow")


@functools.cache
def code_record() -> dict[str, str]:
    """Commit (where known), a digest of the package's sources, and versions.

    A submitted job's working directory carries no ``.git``: the digest of the sources identifies the code there, and
    ``$DDPM_GIT_COMMIT`` may carry the commit (a container image sets it).
    """
    record = {"version": _version("ddpm-ray"), "source_sha256": _source_digest(), "python": platform.python_version()}
    commit = os.environ.get("DDPM_GIT_COMMIT") or _git_commit()
    if commit:
        record["git_commit"] = commit
    return record | {name: _version(name) for name in _LIBRARIES}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _source_digest() -> str:
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _git_commit() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if dirty else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
