"""The troubleshooting page has every message that a job can end with, but for those of parts that are listed here."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from runner import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
WORDS_THAT_TELL = 3
# Modules with messages that are not on the page, and why a reader does not need them there.
EXCEPTED = {
    "cli.py": "tyro's own words, which begin the page",
    "diffusion/averages.py": "only files that were altered under their checksum can cause it",
    "diffusion/likelihood.py": "--variance has been checked by the command line before",
    "diffusion/noise_schedule.py": "--schedule has been checked by the command line before",
    "diffusion/samplers.py": "--variance and --eta have been checked before",
    "diffusion/timesteps.py": "--timestep-spacing has been checked by the command line before",
    "diffusion/unet.py": "two of its messages have a gap where the page has the knob",
    "evaluation/feature_sample.py": "caught: what was kept is made anew",
    "evaluation/gathering.py": "caught: what was kept is made anew",
    "evaluation/inception_score.py": "caught: what was kept is made anew",
    "evaluation/reference.py": "caught: what was kept is made anew",
    "evaluation/statistics.py": "caught: what was kept is made anew",
    "serving.py": "an answer to a request of MLflow's model server, not to a command",
}


@dataclass(frozen=True)
class Message:
    """What one ``raise`` says; values are a gap between literal parts."""

    module: str
    line: int
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {' ... '.join(self.parts)}"


def plain(text: str) -> list[str]:
    """The words, without marks."""
    return re.findall(r"[a-z0-9_]+", text.lower())


def headings() -> list[list[str]]:
    """The quoted messages of the page, as words."""
    return [plain(quoted) for bold in re.findall(r"\*\*(.+?)\*\*", PAGE, flags=re.S) for quoted in bold.split("`, ")]


def literals(node: ast.expr) -> tuple[str, ...]:
    """Literal parts of a message; nothing of one that is passed on."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (node.value,)
    if isinstance(node, ast.JoinedStr):
        return tuple(str(value.value) for value in node.values if isinstance(value, ast.Constant))
    if isinstance(node, ast.BinOp):
        return literals(node.left) + literals(node.right)
    return ()


def messages() -> Iterator[Message]:
    for path in sorted(ROOT.glob("pipeline/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "WorldError")
            if is_error and node.args:
                parts = literals(node.args[0])
                if any(len(plain(part)) >= 2 for part in parts):
                    yield Message(str(path.relative_to(ROOT / "pipeline")), node.lineno, parts)


def is_on_the_page(message: Message, quoted: list[list[str]]) -> bool:
    """Whether a quoted message has enough words of one literal part, in their order and side by side."""
    for part in message.parts:
        words = plain(part)
        length = min(WORDS_THAT_TELL, len(words))
        if length < 2:
            continue
        runs = {tuple(words[place : place + length]) for place in range(len(words) - length + 1)}
        if any(tuple(line[place : place + length]) in runs for line in quoted for place in range(len(line))):
            return True
    return False


@functools.cache
def missing() -> list[Message]:
    quoted = headings()
    return [message for message in messages() if not is_on_the_page(message, quoted)]


def test_every_message_is_on_the_page_or_its_module_is_excepted():
    assert [str(message) for message in missing() if message.module not in EXCEPTED] == []


def test_no_exception_is_left_over():
    assert EXCEPTED.keys() <= {message.module for message in missing()}
    assert all(len(reason.split()) > 3 for reason in EXCEPTED.values())


def test_the_search_finds_messages_and_notices_one_that_is_missing():
    assert len(list(messages())) > 250
    quoted = [plain("LOCATION holds no data set: there is no manifest.json")]
    assert is_on_the_page(Message("x", 1, ("", " holds no data set: run ", "!")), quoted)
    assert not is_on_the_page(Message("x", 1, ("", " holds no model of ours")), quoted)
