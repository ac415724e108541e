"""The documentation: its commands parse, its links lead somewhere, the reference is current, and the way in works."""

import os
import re
import runpy
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runner import ROOT, load_job, run_job

from pipeline.errors import UserError

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
JOBS = {path.stem for path in ROOT.glob("jobs/*.py")}
ENDS_A_COMMAND = {"#", "&&", "||", "|", ";", ">", "&"}


@dataclass(frozen=True)
class Command:
    """A job's command line in a page."""

    page: Path
    line: int
    words: tuple[str, ...]

    @property
    def job(self) -> str:
        return next(Path(word).stem for word in self.words if word.endswith(".py"))

    @property
    def flags(self) -> list[str]:
        place = next(place for place, word in enumerate(self.words) if word.endswith(".py"))
        return list(self.words[place + 1 :])

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Numbers and lines of fenced and indented code, and of recipes; a backslash at the end joins lines."""
    is_fenced, started, text = False, 0, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith(("    ", "\t")):
            started, text = (started, text + line.strip()) if text else (number, line.strip())
            if text.endswith("\\"):
                text = text[:-1]
            else:
                yield started, text
                text = ""


def commands(page: Path) -> list[Command]:
    """Every command of a page that names a job of ours, also behind ``ray job submit``."""
    found = []
    for number, line in blocks(page):
        if not re.search(r"python3? jobs/\w+\.py", line):
            continue
        words = shlex.split(line.replace("$(ARGS)", ""), comments=True)
        begin = next(place for place, word in enumerate(words) if re.fullmatch(r"jobs/\w+\.py", word))
        words = words[begin:]
        end = next((place for place, word in enumerate(words) if word in ENDS_A_COMMAND), len(words))
        found.append(Command(page, number, tuple(words[:end])))
    return found


ALL_COMMANDS = [command for page in [*PAGES, ROOT / "Makefile"] for command in commands(page)]


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


SMALLER = {
    "train": "--steps 6 --checkpoint-every 3 --base-channels 8 --quality-images 0 --grid-images 4 --sampling-steps 3 "
    "--num-images 4 --chunk-size 4",
    "evaluate": "--num-images 4 --chunk-size 4 --sampling-steps 3",
    "show": "--num-images 2 --sampling-steps 3",
}
"""What makes documented commands short: appended, so that it overrides what is written."""


def run_as_written(command: Command, placeholders: Mapping[str, str]) -> None:
    """Runs a documented command with its placeholders filled in; in this process if it starts no Ray, to save time."""
    flags = [re.sub(r"\b[A-Z]{4,}\b", lambda name: placeholders.get(name[0], name[0]), word) for word in command.flags]
    if "--report" not in flags:
        flags += SMALLER.get(command.job, "").split()
    if command.job == "show" or {"--report", "--dry-run"} & set(flags):
        load_job(command.job).main(flags)
        return
    done = run_job(command.job, *flags)
    assert done.code == 0, f"{command}: {shlex.join(flags)}\n{done.stderr}"


@pytest.mark.slow
def test_the_tutorial_works_as_written(tmp_path: Path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for number in range(80):
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:03d}.jpg")
    written = commands(ROOT / "docs" / "tutorial.md")
    assert [command.job for command in written] == [
        "prepare_data",
        "show",
        "train",
        "train",
        "evaluate",
        "evaluate",
        "show",
    ]
    for command in written:
        run_as_written(command, {"PICTURES": str(pictures)})
    home = Path(os.environ["DDPM_HOME"])
    report = (home / "reports" / "ddpm.html").read_text()
    assert report.count("<circle") == 2  # a point for each checkpoint
    assert (home / "show" / "mine-step-6" / "index.html").exists()
