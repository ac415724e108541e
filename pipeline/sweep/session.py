"""The tune job: MLflow, Ray, the sweep."""

import datetime
import secrets
from dataclasses import replace

from pipeline import cluster
from pipeline.config import TuneConfig
from pipeline.sweep.report import SweepResult
from pipeline.sweep.tuner import tune
from pipeline.tracking import Tracker

__all__ = ["run_sweep"]


def run_sweep(config: TuneConfig) -> SweepResult:
    """Runs the sweep called ``--name``, or continues it; starts Ray if no cluster is given. Raises as ``tune``."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = config.base.name or f"sweep-{config.base.preset}-{now}-{secrets.token_hex(2)}"
    config = replace(config, base=replace(config.base, name=None))
    tracker = Tracker()
    workers = config.base.cluster
    with cluster.connect(num_cpus=workers.max_workers * workers.cpus_per_worker):
        return tune(config, name, tracker)
