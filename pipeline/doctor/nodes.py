"""The nodes of a cluster, each as a job that runs there meets it."""

from collections.abc import Callable
from typing import Any

from pipeline import cluster
from pipeline.doctor import machine
from pipeline.doctor.finding import Finding, fail, guarded, ok, redact, warn
from pipeline.doctor.stores import storage_serves
from pipeline.errors import first_line

__all__ = ["each_gpu", "each_node", "look_at_devices", "look_at_node"]

_SECONDS = 120.0
"""How long a node may take: its first task starts a process, which imports the project."""
_MEND = "give all nodes the same image and settings, and submit with --working-dir ."


def each_node() -> list[Finding]:
    """Storage, memory, disks and versions as a task of every living node finds them."""
    found: list[Finding] = []
    here = machine.versions()
    for node, answer in cluster.on_each_node(look_at_node, num_gpus=0, seconds=_SECONDS).items():
        if isinstance(answer, Exception):
            found.append(fail("node", f"{node}: {first_line(answer)}", _MEND))
            continue
        findings = _read(node, answer["findings"])
        there = answer["versions"]
        other = [f"{name} {there.get(name)} (here {here[name]})" for name in here if there.get(name) != here[name]]
        if other:
            findings.append(fail("versions", f"node {node}: {', '.join(other)}", _MEND))
        bad = [finding for finding in findings if finding.state != "ok"]
        found += bad or [ok("node", f"{node}: storage, memory, disk and versions are as jobs need them")]
    return found


def each_gpu() -> list[Finding]:
    """One GPU of every node that has some."""
    answers = cluster.on_each_node(look_at_devices, num_gpus=1, seconds=_SECONDS)
    found: list[Finding] = []
    for node, answer in answers.items():
        if isinstance(answer, TimeoutError):
            found.append(warn("gpu", f"node {node}: no GPU was free in {_SECONDS:.0f} s", "look again later"))
        elif isinstance(answer, Exception):
            found.append(fail("gpu", f"node {node}: {first_line(answer)}", _MEND))
        else:
            found += _read(node, answer["findings"])
    return found or [ok("gpu", "no node with a GPU is up, so none was looked at")]


def look_at_node() -> dict[str, Any]:
    """Runs on a node: what is there, without secrets of its environment."""
    rounds = (
        ("storage", "compare DDPM_HOME, endpoint and role of this node with the store", storage_serves),
        ("memory", "", machine.shared_memory),
        ("disk", "", machine.disks),
        ("versions", "make install", machine.packages),
    )
    return {"findings": _told(rounds), "versions": machine.versions()}


def look_at_devices() -> dict[str, Any]:
    """Runs on a node with a GPU of its own."""
    return {"findings": _told((("gpu", "install torch again", machine.torch_devices),))}


def _told(rounds: tuple[tuple[str, str, Callable[[], list[Finding]]], ...]) -> list[dict[str, str]]:
    found = [finding for name, mend, look in rounds for finding in guarded(name, mend, look)]
    return [{name: redact(text) for name, text in finding.to_json().items()} for finding in found]


def _read(node: str, told: list[dict[str, Any]]) -> list[Finding]:
    return [Finding(**{**finding, "text": f"node {node}: {finding['text']}"}) for finding in told]
