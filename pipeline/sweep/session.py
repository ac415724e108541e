"""The tune job: a new sweep, or one to go on with."""

import datetime
import secrets
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import TuneConfig
from pipeline.errors import UserError
from pipeline.sweep.conclusion import write_report
from pipeline.sweep.record import SweepRecord
from pipeline.sweep.report import SweepResult
from pipeline.sweep.tuner import tune
from pipeline.tracking import Tracker

__all__ = ["Reported", "run_sweep"]


@dataclass(frozen=True, kw_only=True)
class Reported:
    """The report on a sweep, made again."""

    location: str

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return {"report": self.location}

    def text(self) -> str:
        """Where it lies, for a person."""
        return f"report: {self.location}"


def run_sweep(config: TuneConfig) -> SweepResult | Reported:
    """Runs the sweep called ``--name``, or continues it or that of ``--restore``; or writes the report on ``--report``.

    Raises:
        UserError: As ``tune``; there is no sweep to restore, or it was given other flags.
        WorldError: As ``tune``.
    """
    if config.report is not None:
        return _report(config.report)
    if config.restore is not None:
        name, config = config.restore, _restored(config)
    else:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = config.base.name or f"sweep-{config.base.preset}-{now}-{secrets.token_hex(2)}"
        config = replace(config, base=replace(config.base, name=None))
    return tune(config, name, Tracker())


def _report(name: str) -> Reported:
    tracker = Tracker()
    run = tracker.find_run(name)
    if run is None:
        raise UserError(
            f"--report {name}: no sweep of this name; the newest runs are: {', '.join(tracker.run_names())}"
        )
    return Reported(location=write_report(name, None, tracker, run_id=run.info.run_id))


def _restored(config: TuneConfig) -> TuneConfig:
    """The config that a sweep was started with, from its own record."""
    assert config.restore is not None
    if replace(config, restore=None) != TuneConfig():
        raise UserError(
            "--restore takes everything from the sweep's record; give no other flag, or --name and all flags"
        )
    record = SweepRecord.load(config.restore)
    if record is None:
        raise UserError(f"--restore {config.restore}: no sweep of this name has begun under this DDPM_HOME")
    return record.config
