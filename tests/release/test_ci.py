"""What a hosting service runs: the supported Pythons, by targets that the Makefile has."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_supported_python_is_tested_and_no_other():
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert JOBS["fast"]["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_the_oldest_python_runs_everything():
    (python,) = (
        step["with"]["python-version"] for step in JOBS["all"]["steps"] if "python-version" in step.get("with", {})
    )
    assert PROJECT["requires-python"] == f">={python}"
    assert JOBS["all"]["steps"][-1]["run"].endswith(".ci/run")


def test_its_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    commands = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        assert Path(ROOT / command.split()[-1]).is_file() or command.split()[-1] in targets, command
