"""Reads the files under test, and turns a command found in one into the configuration that its job would run with."""

import functools
import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay" / "base"
OVERLAYS = INFRA / "kuberay" / "overlays"
IMAGE_PROJECT = "/opt/ddpm-ray"

Document = dict[str, Any]


def load(path: Path) -> Document:
    """The one document of a YAML file."""
    (document,) = load_all(path)
    return document


def load_all(path: Path) -> list[Document]:
    """All documents of a YAML file."""
    return list(yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader))


@functools.cache
def overlay(name: str) -> tuple[Document, ...]:
    """Every Kubernetes object of an overlay's own, as written."""
    names = [entry for entry in load(OVERLAYS / name / "kustomization.yaml")["resources"] if entry.endswith(".yaml")]
    return tuple(document for entry in names for document in load_all(OVERLAYS / name / entry))


@functools.cache
def manifests() -> tuple[Document, ...]:
    """Every Kubernetes object of the base, as written."""
    names = load(KUBERAY / "kustomization.yaml")["resources"]
    return tuple(document for name in names for document in load_all(KUBERAY / name))


def manifest(kind: str) -> Document:
    """The base's one object of a kind."""
    (found,) = (document for document in manifests() if document["kind"] == kind)
    return found


def pod_templates() -> dict[str, Document]:
    """The template of every pod that the base or an overlay starts, by a readable name."""
    job, cluster = manifest("RayJob")["spec"], manifest("RayCluster")["spec"]
    found = {"cronjob": manifest("CronJob")["spec"]["jobTemplate"]["spec"]["template"]}
    found["rayjob-submitter"] = job["submitterPodTemplate"]
    (cron,) = overlay("raycronjob")
    ticks = cron["spec"]["jobTemplate"]["rayClusterSpec"]
    for name, spec in (("rayjob", job["rayClusterSpec"]), ("raycluster", cluster), ("raycronjob", ticks)):
        found[f"{name}-head"] = spec["headGroupSpec"]["template"]
        found |= {f"{name}-{group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
    return found


@functools.cache
def job_module(path: str) -> ModuleType:
    """A script of ``jobs/`` as a module."""
    name = "infra_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def parsed(command: str | list[str]) -> tuple[str, Any]:
    """The job of a command and its configuration, read by the job's own parser: a renamed flag fails here."""
    words = shlex.split(command) if isinstance(command, str) else command
    (start,) = (index for index, word in enumerate(words) if word.startswith("jobs/"))
    assert Path(words[start - 1]).name == "python", f"{words[start - 1]} does not run {words[start]}"
    end = next((index for index, word in enumerate(words) if word in ("2>&1", "|", ">>", "&&") and index > start), None)
    return words[start], job_module(words[start]).parse_arguments(words[start + 1 : end]).config
