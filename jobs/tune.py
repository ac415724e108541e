"""Sweeps noise schedules with Ray Tune: ``python jobs/tune.py --help``."""

from dataclasses import dataclass, field
from typing import Any

from pipeline import cli
from pipeline.config import TuneConfig


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Sweep noise schedules: which type, T and beta range gives the smallest Frechet distance?"""

    config: TuneConfig = field(default_factory=TuneConfig)


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse_with_preset(Arguments, argv, program="jobs/tune.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Runs a sweep; returns the trials and the winner."""
    config = parse_arguments(argv).config
    from pipeline.sweep.session import run_sweep

    result = run_sweep(config)
    return result.to_json(), result.text()


if __name__ == "__main__":
    cli.run_job(main)
