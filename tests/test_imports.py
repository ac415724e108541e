"""Imports go one way: who may know whom, inside the package and outside it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/*.py")])

_ENGINE = {
    "charts", "cluster", "config", "data", "diffusion", "draws", "errors", "generation", "images", "model_folder",
    "provenance", "storage", "tracking",
}  # fmt: skip
MAY_KNOW = {
    "errors": set(),
    "draws": set(),
    "images": set(),
    "provenance": set(),
    "charts": set(),
    "config": {"errors"},
    "presets": {"config", "errors"},
    "cluster": {"errors"},
    "cli": {"cluster", "config", "errors", "presets"},
    "storage": {"errors"},
    "tracking": {"config", "errors", "storage"},
    "diffusion": {"errors"},
    "model_folder": {"config", "diffusion", "draws", "errors", "storage"},
    "generation": {"config", "diffusion", "draws", "errors", "images"},
    "serving": {"config", "errors", "generation", "model_folder"},
    "interop": {"config", "diffusion", "errors", "model_folder", "provenance", "storage"},
    "data": {"cluster", "config", "draws", "errors", "images", "storage"},
    "doctor": {"cluster", "errors", "storage", "tracking"},
    "training": _ENGINE,
    "evaluation": _ENGINE,
    "show": _ENGINE,
    "sweep": _ENGINE | {"evaluation", "training"},
    "jobs": _ENGINE | {"cli", "doctor", "evaluation", "interop", "presets", "show", "sweep", "training"},
}
"""Which modules and sub-packages of ``pipeline`` each of them (and ``jobs``) may import."""

ONLY_IN = {
    "ray": ("training", "evaluation", "sweep", "data/tasks.py", "cluster.py", "jobs"),
    "mlflow": ("tracking",),
    "boto3": ("storage",),
    "botocore": ("storage",),
    "mypy_boto3_s3": ("storage",),
    "webdataset": ("data",),
    "matplotlib": ("show",),
    "optuna": ("sweep",),
    "tyro": ("cli.py", "config.py"),
}
"""Where a third-party library may be imported: sub-packages (or modules of that name) and single files."""


def imported(path: Path) -> set[str]:
    """Absolute names of all that a file imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    """The row of ``MAY_KNOW`` that a file belongs to."""
    words = path.relative_to(ROOT).with_suffix("").parts
    return words[0] if words[0] == "jobs" else words[1]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nimport json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_every_part_of_the_package_has_its_place_in_the_import_order():
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(MAY_KNOW)


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_a_file_imports_only_parts_it_may_know(path):
    if part_of(path) == "__init__":
        return
    known = {name.split(".")[1] for name in imported(path) if name.split(".")[0] == "pipeline"}
    assert known - {part_of(path)} <= MAY_KNOW[part_of(path)]


def test_the_allowed_imports_have_no_circle():
    remaining = dict(MAY_KNOW)
    while remaining:
        leaves = {part for part, known in remaining.items() if not known & remaining.keys()}
        assert leaves, f"these import each other: {sorted(remaining)}"
        remaining = {part: known for part, known in remaining.items() if part not in leaves}


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_nobody_imports_a_job(path):
    assert not {name for name in imported(path) if name.split(".")[0] == "jobs"}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_behind_its_seam(library):
    users = {path for path in FILES if library in {name.split(".")[0] for name in imported(path)}}
    strangers = {
        identify(path)
        for path in users
        if part_of(path) not in ONLY_IN[library] and identify(path).removeprefix("pipeline/") not in ONLY_IN[library]
    }
    assert strangers == set()


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/*.py")), ids=identify)
def test_a_job_is_at_most_50_lines(path):
    assert len(path.read_text().splitlines()) <= 50


def test_no_file_is_a_drawer_for_everything():
    assert not {identify(path) for path in FILES if path.stem in ("utils", "util", "common", "helpers", "misc")}


def test_the_mathematics_loads_neither_ray_nor_mlflow_nor_boto3():
    modules = [f"pipeline.diffusion.{path.stem}" for path in ROOT.glob("pipeline/diffusion/[a-z]*.py")]
    assert len(modules) >= 5
    assert not loaded_after(f"import {', '.join(modules)}") & {"ray", "mlflow", "boto3", "pipeline.storage"}


def test_the_command_line_answers_before_anything_heavy_is_loaded():
    assert not loaded_after("import pipeline.cli") & {"torch", "ray", "mlflow", "boto3"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/*.py")), ids=identify)
def test_a_job_loads_ray_only_after_its_environment_is_set(path):
    """Ray reads its token when it is first imported, and ``run_job`` sets it before the job's main function runs."""
    loaded = loaded_after(f"import runpy; runpy.run_path({str(path)!r}, run_name='imported')")
    assert not loaded & {"ray", "mlflow"}
