"""Commands in the documents for operators are commands that the programs understand."""

import re
import shlex
from pathlib import Path

import pytest
from infra_files import ROOT, parsed

DOCUMENTS = [ROOT / "docs" / "operations.md", ROOT / "docs" / "security.md", ROOT / "infra" / "README.md"]


def commands(path: Path) -> list[str]:
    """Lines of code blocks and inline code that start a program of the project or a tool of Ray."""
    text = path.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line.partition("  #")[0].strip() for line in lines]


def of(program: str) -> list[str]:
    return [line for path in DOCUMENTS for line in commands(path) if re.search(rf"(^|\s){program}(\s|$)", line)]


JOBS = of(r"python jobs/\w+\.py")


@pytest.mark.parametrize("command", [line for line in JOBS if "doctor" not in line])
def test_every_job_in_the_documents_is_understood_by_its_parser(command: str) -> None:
    job, config = parsed(command.partition(";")[0])
    assert (ROOT / job).is_file()
    assert config is not None


def test_there_are_commands_for_each_verb() -> None:
    assert {"train", "evaluate", "prepare_data", "doctor"} <= {
        name for line in JOBS for name in re.findall(r"jobs/(\w+)\.py", line)
    }


@pytest.mark.parametrize("command", of("ray job"))
def test_ray_understands_its_commands(command: str) -> None:
    from ray.dashboard.modules.job.cli import job_cli_group

    words = shlex.split(command)
    verb, *rest = words[words.index("job") + 1 :]
    if rest:
        job_cli_group.commands[verb].make_context(verb, rest)
    assert verb in job_cli_group.commands


@pytest.mark.parametrize("command", of("make"))
def test_every_target_of_make_exists(command: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shlex.split(command)[1] in targets


@pytest.mark.parametrize("command", [*of("python infra/backup"), *of("infra/schedules/evaluate.sh")])
def test_every_script_exists_and_takes_the_verb(command: str) -> None:
    words = shlex.split(command)
    path = next(word for word in words if word.startswith("infra/"))
    assert (ROOT / path).exists()
    if path == "infra/backup":
        assert words[words.index(path) + 1] in ("save", "restore")
    else:
        assert parsed(["python", "jobs/evaluate.py", "--pending", *words[1:]])[1].pending


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_path_in_the_documents_leads_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:infra|tests|jobs|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
