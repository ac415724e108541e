"""``jobs/train.py`` as a child process that is watched from outside: when does it take which step?"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

__all__ = ["Job"]

_JOB = Path(__file__).resolve().parents[1] / "jobs" / "train.py"
# Seldom: on a full machine whoever looks takes time from what is measured. An error of 1 % of what is timed.
_POLL_SECONDS = 0.2
_END_SECONDS = 120.0


class Job:
    """A training job with a home, and so a Ray cluster and an MLflow store, of its own.

    A worker's audit log has a line for each step, written when the step begins: that of step n + 1 says that step n is
    done.
    """

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        """Starts it.

        Args:
            folder: Its home; audit logs and output lie there.
            flags: Of ``jobs/train.py``, without ``--audit-dir`` and ``--json``.
        """
        self._audit = folder / "audit"
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"DDPM_HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true"}
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        command = [sys.executable, str(_JOB), *flags, "--audit-dir", str(self._audit), "--json"]
        self._errors = folder / "stderr.txt"
        self.started = time.monotonic()
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends what still runs, first politely."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def result(self) -> dict[str, Any]:
        """Waits for the end and returns the job's JSON."""
        output, _ = self._process.communicate()
        if self._process.returncode != 0:
            raise RuntimeError(f"jobs/train.py failed: {self._errors.read_text().strip().splitlines()[-1:]}")
        found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return found

    def lines(self) -> int:
        """Lines of rank 0's audit logs so far, of all numbers of workers."""
        return sum(path.read_bytes().count(b"\n") for path in self._audit.glob("rank-00000-*.jsonl"))

    def wait_for_lines(self, count: int, *, timeout: float = 300.0) -> float:
        """Waits until there are so many lines; returns the time, monotonic."""
        give_up = time.monotonic() + timeout
        while self.lines() < count:
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the job took no step {count}: {self._errors.read_text()[-2000:]}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic()

    def step_times(self, first: int, last: int) -> float:
        """Seconds from the beginning of step ``first`` to that of step ``last``, both 0-based."""
        begun = self.wait_for_lines(first + 1)
        return self.wait_for_lines(last + 1) - begun

    def workers(self) -> list[psutil.Process]:
        """The processes of Ray Train's workers."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()]):
                    found.append(process)
            except psutil.Error:
                continue
        return found
