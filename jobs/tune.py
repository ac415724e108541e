"""Sweeps noise schedules with Ray Tune: ``python jobs/tune.py --help``."""

from dataclasses import asdict, dataclass, field
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
    facts = {
        "sweep": result.name,
        "run_id": result.run_id,
        "metric": result.metric,
        "protocol": result.identity,
        "winner": asdict(result.winner) if result.winner else None,
        "verdict": result.verdict(),
        "registered": result.registered,
        "trials": [asdict(trial) for trial in result.trials],
        "refused": [asdict(entry) for entry in result.refused],
    }
    return facts, result.text()


if __name__ == "__main__":
    cli.run_job(main)
