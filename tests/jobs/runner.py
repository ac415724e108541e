"""Runs the jobs as a person does: as processes, from the repository's root."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TINY = ["--base-channels", "8", "--batch-size", "32", "--steps", "20", "--checkpoint-every", "10"]
TINY += ["--log-every", "5", "--sampling-steps", "5", "--grid-images", "4", "--quality-images", "0"]
TINY += ["--num-workers", "1"]
"""A run of seconds; by one worker, since each process takes seconds to start."""


CLUSTER: dict[str, str] = {}
"""The environment of a cluster that jobs join; empty: each starts a private one (see the fixture ``one_cluster``)."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished job."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """What ``--json`` printed, which must be the only thing on stdout."""
        lines = self.stdout.splitlines()
        assert len(lines) == 1, self.stdout
        record: dict[str, Any] = json.loads(lines[0])
        return record


def run_job(name: str, *words: str, timeout: float = 600, **environment: str) -> Done:
    """Runs ``jobs/NAME.py``."""
    command = [sys.executable, f"jobs/{name}.py", *words]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **CLUSTER, **environment}, capture_output=True, text=True, timeout=timeout
    )
    return Done(code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def succeed(name: str, *words: str, **environment: str) -> dict[str, Any]:
    """Runs a job with ``--json`` that must succeed, and returns its result."""
    done = run_job(name, *words, "--json", **environment)
    assert done.code == 0, done.stderr
    return done.result


def load_job(name: str) -> ModuleType:
    """A job as a module, for errors that need no process of their own."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
