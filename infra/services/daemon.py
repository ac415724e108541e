"""Processes that outlive the command that started them, and that another command finds again and ends."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import ServiceError


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """A server with a log and a file that says which process it is."""

    name: str
    folder: Path
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    reads: str = ""
    """What it reads once, at its start: with other contents it has to start again."""
    ready: Callable[[], bool]
    seconds: float
    """How long a start may take."""
    stop_signal: signal.Signals = signal.SIGTERM
    stop_group: bool = True
    """Whether its children get the signal as well."""

    def start(self) -> bool:
        """Starts it and waits until it is ready; returns False if it was running as it should.

        One that was started with another command, environment or settings is ended first.

        Raises:
            ServiceError: It ended, or did not become ready.
        """
        running = self.is_current()
        if not running:
            self.stop()
        if not running and self.ready():
            raise ServiceError(f"{self.name}: something else answers on its port; give another port, or end it")
        process = None if running else self._spawn()
        deadline = time.monotonic() + self.seconds
        while not self.ready():
            if process is not None and process.poll() is not None:
                raise ServiceError(f"{self.name} ended at its start: {self._last_line()} (all of it: {self._log})")
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.name} did not become ready in {self.seconds:.0f} s; see {self._log}")
            time.sleep(0.1)
        return not running

    def stop(self, seconds: float = 15) -> bool:
        """Ends the process that this file's ``start`` began, and nobody else; returns False if there is none."""
        pid = self.pid()
        if pid is not None:
            send = os.killpg if self.stop_group else os.kill
            _send(send, pid, self.stop_signal)
            deadline = time.monotonic() + seconds
            while self.pid() is not None and time.monotonic() < deadline:
                time.sleep(0.1)
            _send(os.killpg, pid, signal.SIGKILL)
        self._record.unlink(missing_ok=True)
        return pid is not None

    def pid(self) -> int | None:
        """The process if it lives: its number alone may belong to another process by now."""
        record = self._recorded()
        return record["pid"] if record and _birth(record["pid"]) == record["birth"] else None

    def is_current(self) -> bool:
        """Whether it runs, and was started as it would be now."""
        return self.pid() is not None and self._recorded().get("started_as") == self._started_as()

    def _recorded(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._record.read_text())
        except FileNotFoundError:
            return {}
        return found

    def _started_as(self) -> str:
        """A digest, since secrets are among it."""
        parts = [list(self.command), sorted(self.environment.items()), self.reads]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        foreign = ("AWS_", "MLFLOW_", "PG")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited, **self.environment},
                cwd=self.folder,
                start_new_session=True,
            )
        self._record.parent.mkdir(exist_ok=True)
        record = {"pid": process.pid, "birth": _birth(process.pid), "started_as": self._started_as()}
        self._record.write_text(json.dumps(record))
        return process

    def _last_line(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no word"

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def _record(self) -> Path:
        return self.folder / "run" / f"{self.name}.json"


def answers(url: str) -> bool:
    """Whether a server answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _birth(pid: int) -> str | None:
    """When a process began, so that no later one of the same number is taken for it; None if it is gone."""
    try:
        state, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].strip().partition(" ")
        return (
            None
            if state == "Z"
            else f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {rest.split()[18]}"
        )
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip() or None


def _send(send: Callable[[int, int], None], pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, number)
