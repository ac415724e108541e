"""What a table of numbers needs around it: the machine, medians with their spread, Markdown."""

import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["MIB", "machine", "markdown", "spread", "version_of"]

MIB = 2**20
_PACKAGES = ("ddpm-ray", "torch", "numpy", "pillow", "imagecodecs", "webdataset")


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    versions = {name: version_of(name) for name in _PACKAGES}
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "commit": _commit(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": {name: version for name, version in versions.items() if version},
    }


def version_of(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median and range, as ``5 (4..7)``."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}..{max(values):{form}})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], facts: dict[str, Any]) -> str:
    """A table, the first column to the left, and the machine below it."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}, Python "
            f"{facts['python']}; commit {facts['commit']}; load at the start {facts['load_at_start']}.",
            f"{versions}.",
        ]
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
