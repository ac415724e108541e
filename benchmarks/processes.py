"""Measuring in fresh processes: a child says when its imports are done, and its memory is watched from outside."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["ChildError", "Memory", "own_memory", "peak_since_reset", "ready", "reset_peak", "run_child"]

_READY = "READY"
_PERIOD_SECONDS = 0.05
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ChildError(Exception):
    """A measurement failed; the message is its reason in one line."""


@dataclass(frozen=True)
class Memory:
    """Memory of a process and its descendants, bytes.

    Attributes:
        rss: Sum of resident set sizes; pages that processes share count in each of them.
        pss: Sum of proportional set sizes, which count a shared page once; 0 where it was not asked for.
    """

    rss: int
    pss: int


def run_child(
    script: str,
    arguments: dict[str, Any],
    *,
    timeout: float = 600,
    pss: bool = False,
    env: dict[str, str] | None = None,
    python: Path | None = None,
) -> dict[str, Any]:
    """Runs ``python SCRIPT JSON`` in a process of its own; its last line of output is its result.

    Args:
        script: File beside this one, whose process calls ``ready`` once.
        arguments: What it gets.
        timeout: Seconds until it is given up.
        pss: Watch the proportional set size too. That costs the child time: not for measurements of speed.
        env: Its environment; None: this one's.
        python: Its interpreter; None: this one.

    Returns:
        The result, with ``memory_growth``: the peak above what it had when it was ready, as the fields of ``Memory``.

    Raises:
        ChildError: It failed.
    """
    command = [str(python or sys.executable), str(Path(__file__).with_name(script)), json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=env
        )
        assert child.stdout is not None
        try:
            base = _wait_until_ready(child, output)
            peak = _watch(child, base or Memory(0, 0), time.monotonic() + timeout, pss)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            output.write(child.stdout.read())
            child.wait()
        output.seek(0)
        errors.seek(0)
        lines = output.read().splitlines()
        if child.returncode or base is None or not lines:
            raise ChildError(_reason(child.returncode, errors.read()))
    return json.loads(lines[-1]) | {"memory_growth": asdict(Memory(peak.rss - base.rss, peak.pss - base.pss))}


def ready() -> None:
    """Said by a child: imports are done, watch from here."""
    print(_READY, json.dumps(asdict(own_memory(pss=True))), flush=True)


def own_memory(*, pss: bool = False) -> Memory:
    """Of this process alone."""
    return _memory_of(os.getpid(), pss)


def reset_peak() -> None:
    """Begins a new peak of this process: what importing took is over."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset() -> int:
    """Largest resident set of this process since ``reset_peak``, bytes; unlike ru_maxrss it knows no parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _wait_until_ready(child: "subprocess.Popen[str]", output: Any) -> Memory | None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(_READY):
            return Memory(**json.loads(line.removeprefix(_READY)))
        output.write(line)  # what a library prints while it is imported
    child.wait()
    return None


def _watch(child: "subprocess.Popen[str]", base: Memory, deadline: float, pss: bool) -> Memory:
    """The peaks until the child ends."""
    rss, proportional = base.rss, base.pss
    while child.poll() is None:
        if time.monotonic() > deadline:
            raise ChildError("took too long")
        family = _family(child.pid)
        now = [_memory_of(pid, pss) for pid in family]
        # While a process begins or ends, its share of common pages would count twice.
        if _family(child.pid) == family and all(each.rss for each in now):
            rss = max(rss, sum(each.rss for each in now))
            proportional = max(proportional, sum(each.pss for each in now))
        time.sleep(_PERIOD_SECONDS)
    return Memory(rss, proportional)


def _family(pid: int) -> list[int]:
    """A process and its descendants; read from the kernel, since listing all processes of the machine costs time."""
    found, waiting = [], [pid]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has just ended
    return found


def _memory_of(pid: int, pss: bool) -> Memory:
    try:
        rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
        if not pss:
            return Memory(rss, 0)
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return Memory(rss, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")))
    except OSError:
        return Memory(0, 0)


def _reason(code: int, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if lines and lines[-1].startswith("ModuleNotFoundError"):
        return f"not installed ({lines[-1].partition(': ')[2]})"
    return lines[-1][:200] if lines else f"ended with status {code} and said nothing"
