"""The command line of every job: flags from the config, one-line errors, exit codes, ``--json``.

Exit codes: 0 done, 1 the world failed (a server is away, training diverged), 2 the command was wrong, 130 Ctrl-C.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import tyro

from pipeline import cluster
from pipeline.config import Switch, TrainConfig
from pipeline.errors import Interrupted, UserError, WorldError
from pipeline.presets import PRESETS, preset

__all__ = ["JobFlags", "continuation", "parse", "parse_with_preset", "run_job"]

A = TypeVar("A")
Result = dict[str, Any]

_FLAGS = (tyro.conf.OmitArgPrefixes,)


@dataclass(frozen=True, kw_only=True)
class JobFlags:
    """What every job understands."""

    json: Switch = False
    """Print exactly one JSON object, the result, to stdout; everything else goes to stderr."""


def parse(arguments: type[A], argv: list[str], *, program: str, default: A | None = None) -> A:
    """Builds a dataclass from flags.

    Args:
        arguments: The dataclass; nested dataclasses become groups, flags are named by leaf.
        argv: The words after the program's name.
        program: The program's name in messages.
        default: Where values come from that no flag gives; else the dataclass's own defaults.

    Raises:
        UserError: A flag is unknown or a value is not allowed, in one line.
        SystemExit: ``--help`` was printed.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return cast(A, tyro.cli(arguments, args=argv, prog=program, default=default, config=_FLAGS))
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(f"{_one_line(messages.getvalue())} ({program} --help lists all flags)")


def parse_with_preset(arguments: type[A], argv: list[str], *, program: str) -> A:
    """Like ``parse`` for a job whose arguments hold a ``TrainConfig``: ``--preset`` first, other flags over it.

    Raises:
        UserError: As ``parse``; also an unknown preset.
    """
    word = _value_of("--preset", argv)
    if word is None or word not in PRESETS:
        return parse(arguments, argv, program=program)
    return parse(arguments, argv, program=program, default=_with_preset(arguments(), preset(word)))


def _with_preset(arguments: A, base: TrainConfig) -> A:
    """Puts the preset where the ``TrainConfig`` is, at whatever depth."""
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(cast(Any, arguments)):
        value = getattr(arguments, entry.name)
        if isinstance(value, TrainConfig):
            changes[entry.name] = base
        elif dataclasses.is_dataclass(value):
            changes[entry.name] = _with_preset(value, base)
    return cast(A, dataclasses.replace(cast(Any, arguments), **changes))


def _value_of(flag: str, argv: list[str]) -> str | None:
    """The value that tyro takes as well: the last one given."""
    value = None
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            value = argv[index + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def run_job(job: Callable[[list[str]], tuple[Result, str]], argv: list[str] | None = None) -> None:
    """Runs a job's main function and ends the process with an honest exit code.

    Args:
        job: Takes the words of the command line, returns the result as JSON values and as text for a person.
        argv: The words; the process's own when left out.
    """
    words = sys.argv[1:] if argv is None else argv
    cluster.set_environment()
    as_json = "--json" in words
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("alembic", "mlflow", "botocore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with _stdout_for_result(as_json) as print_result, _sigterm_as_interrupt():
        try:
            result, text = job(words)
        except UserError as error:
            result, text = _failure(error, 2)
        except (WorldError, OSError) as error:
            result, text = _failure(error, 1)
        except Interrupted as stop:
            result, text = _failure(stop, 130)
            result["continue_with"] = continuation(words, stop.run)
            print(f"continue with: {result['continue_with']}", file=sys.stderr)
        except KeyboardInterrupt:
            result, text = _failure("interrupted", 130)
        print_result(json.dumps(result) if as_json else text)
        code = int(result.get("exit_code", 0))
    sys.stdout.flush()
    raise SystemExit(code)


def continuation(words: list[str], run: str) -> str:
    """The command line that continues a run: this process's own, with the name that it may have been given since."""
    command = sys.orig_argv[: len(sys.orig_argv) - len(words)] + words
    return shlex.join(command if _value_of("--name", words) else [*command, "--name", run])


def _failure(error: object, exit_code: int) -> tuple[Result, str]:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    return {"error": message, "exit_code": exit_code}, ""


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A stopped job gets SIGTERM, or SIGHUP with its terminal, and has seconds left: it leaves as after Ctrl-C."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    # nohup ignores SIGHUP, and so it stays.
    wanted = [sign for sign in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(sign) != signal.SIG_IGN]
    previous = {sign: signal.signal(sign, interrupt) for sign in wanted}
    try:
        yield
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)


@contextlib.contextmanager
def _stdout_for_result(as_json: bool) -> Iterator[Callable[[str], None]]:
    """With ``as_json``, keeps file descriptor 1 for the result: C++ code and child processes write there too."""

    def print_line(text: str) -> None:
        if text:
            print(text, flush=True)

    if not as_json:
        yield print_line
        return
    sys.stdout.flush()
    real_stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield lambda text: _write_all(real_stdout, f"{text}\n".encode())
    finally:
        sys.stdout.flush()
        os.dup2(real_stdout, 1)
        os.close(real_stdout)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _one_line(boxed: str) -> str:
    """tyro explains errors in a drawn box of several lines; a log or a terminal wants one."""
    boxed = re.sub(r"-{8,}", lambda rule: "─" * len(rule[0]), boxed)  # how it draws on a terminal without UTF-8
    lines = [re.sub(r"[│╭╮╰╯]|\x1b\[[0-9;]*m", "", line).strip() for line in boxed.splitlines()]
    if len(lines) > 1 and set(lines[1]) == {"─"}:
        lines = lines[2:]  # without UTF-8 the box's title is a line of its own
    lines = [line for line in lines if not line.endswith("──") or set(line) == {"─"}]
    text = " ".join("; " if line.startswith("─") else line for line in lines if line)
    text = text.partition("For full helptext")[0].partition("Argument helptext:")[0]
    text = re.sub(r"Error parsing [\w.]+: (?=--|give)", "", text)
    return re.sub(r"\s+", " ", text).replace(" ; ", "; ").strip(" ;")
