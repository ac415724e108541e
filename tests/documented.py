"""Finds the commands of jobs in the documentation."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
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
