"""What a reader of a sweep's report may want to type next."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import TrainConfig, as_params, to_flat

__all__ = ["Command", "commands"]

_NOT_REPEATED = {"name", "preset", "seed"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line and what it is good for."""

    purpose: str
    lines: Sequence[str]


def commands(sweep: str, *, best: Mapping[str, str] | None, ui: Sequence[str]) -> list[Command]:
    """Commands for a sweep.

    Args:
        sweep: Its name.
        best: Params of the best trial's run, if any trial finished.
        ui: How MLflow's page is opened.
    """
    name = shlex.quote(sweep)
    found = [
        Command(
            purpose="Continue the sweep: finished trials are not run again",
            lines=[f"python jobs/tune.py --restore {name}"],
        ),
        Command(purpose="Write this report again", lines=[f"python jobs/tune.py --report {name}"]),
    ]
    if best is not None:
        train = f"python jobs/train.py --name {shlex.quote(f'{sweep}-winner')} {' '.join(_flags(best))}"
        measure = f"python jobs/evaluate.py --run {shlex.quote(best.get('name', ''))} --last"
        found.append(
            Command(purpose="Train the winner anew (add --steps to train it for longer)", lines=[train.strip()])
        )
        found.append(Command(purpose="Measure the winner's last checkpoint by another protocol", lines=[measure]))
    return [*found, Command(purpose="See all runs in MLflow", lines=ui)]


def _flags(params: Mapping[str, str]) -> list[str]:
    """Flags for all knobs that are not at their default, by MLflow's params of a run."""
    defaults = as_params(to_flat(TrainConfig()))
    given = {name: text for name, text in params.items() if name in defaults and text != defaults[name]}
    preset = [f"--preset {params['preset']}"] if params.get("preset", "digits") != "digits" else []
    return preset + [_flag(name, text) for name, text in given.items() if name not in _NOT_REPEATED]


def _flag(name: str, text: str) -> str:
    words = name.replace("_", "-")
    if text in ("true", "false"):
        return f"--{words}" if text == "true" else f"--no-{words}"
    if text.startswith("["):
        return f"--{words} {' '.join(shlex.quote(str(value)) for value in json.loads(text))}".strip()
    return f"--{words} {'None' if text == 'null' else shlex.quote(text)}"
