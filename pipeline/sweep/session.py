"""The tune job: a new sweep, or one to go on with."""

import datetime
import secrets
from dataclasses import replace

from pipeline.config import TuneConfig
from pipeline.errors import UserError
from pipeline.sweep.record import SweepRecord
from pipeline.sweep.report import SweepResult
from pipeline.sweep.tuner import tune
from pipeline.tracking import Tracker

__all__ = ["run_sweep"]


def run_sweep(config: TuneConfig) -> SweepResult:
    """Runs the sweep called ``--name``, or continues it or that of ``--restore``.

    Raises:
        UserError: As ``tune``; there is no sweep to restore, or it was given other flags.
        WorldError: As ``tune``.
    """
    if config.restore is not None:
        name, config = config.restore, _restored(config)
    else:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = config.base.name or f"sweep-{config.base.preset}-{now}-{secrets.token_hex(2)}"
        config = replace(config, base=replace(config.base, name=None))
    return tune(config, name, Tracker())


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
