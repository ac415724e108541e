"""What a reader of a sweep's report may want to type next."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from pipeline.config import TrainConfig, as_params, to_flat

__all__ = ["Command", "commands"]

_NOT_REPEATED = {"name", "preset", "seed"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line and what it is good for."""

    purpose: str
    lines: Sequence[str]


def commands(
    sweep: str,
    *,
    best: Mapping[str, str] | None,
    ui: Sequence[str],
    compared: Sequence[str] = (),
    experiment_id: str = "",
) -> list[Command]:
    """Commands for a sweep.

    Args:
        sweep: Its name.
        best: Params of the best trial's run, if any trial finished.
        ui: How MLflow's page of the sweep is opened; the address comes last.
        compared: Ids of runs to see side by side.
        experiment_id: Their experiment.
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
    found.append(Command(purpose="See the sweep in MLflow", lines=ui))
    if len(compared) > 1 and ui:
        address = _compare_page(ui[-1].partition("/#/")[0], compared, experiment_id)
        found.append(Command(purpose="See the finished runs side by side in MLflow", lines=[address]))
    return found


def _compare_page(server: str, run_ids: Sequence[str], experiment_id: str) -> str:
    """MLflow's page with the params and metrics of some runs, in parallel coordinates and as a table."""
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [experiment_id]))
    return f"{server}/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"


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
