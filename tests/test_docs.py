"""The documentation: commands parse, links lead somewhere, the reference is current, and what it names exists."""

import re
import runpy
from pathlib import Path

import pytest
from documented import ALL_COMMANDS, PAGES, Command
from runner import ROOT, load_job

from pipeline.errors import UserError

JOBS = {path.stem for path in ROOT.glob("jobs/*.py")}


def test_the_pages_hold_commands_of_every_job():
    assert {command.job for command in ALL_COMMANDS} >= JOBS
    assert len(ALL_COMMANDS) > 30


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=str)
def test_a_documented_command_parses(command: Command):
    assert command.job in JOBS
    try:
        load_job(command.job).parse_arguments(command.flags)
    except UserError as error:
        pytest.fail(f"{' '.join(command.words)}: {error}")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower().replace("`", "")
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(found[1]) for found in re.finditer(r"^#+ (.+)$", page.read_text(), flags=re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


def test_pictures_are_small_and_shown():
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }
    pictures = set((ROOT / "docs" / "images").iterdir())
    assert pictures == {path for path in shown if path.parent == ROOT / "docs" / "images"}
    assert max(path.stat().st_size for path in pictures) < 200_000


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]


def test_the_reference_is_what_the_config_says():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]()
    assert (ROOT / "docs" / "reference.md").read_text() == made, "run python docs/make_reference.py"
