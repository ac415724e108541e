"""Trains a DDPM on Ray, or continues a run by its name: ``python jobs/train.py --help``."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pipeline import cli
from pipeline.config import ProtocolConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Train a DDPM on Ray, or continue a run by its --name."""

    dry_run: bool = False
    """Print what would be done and what it needs; start nothing."""
    evaluate: bool = False
    """Evaluate the last checkpoint when training is done."""
    config: TrainConfig = field(default_factory=TrainConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Trains; returns what a person wants to know of the run."""
    arguments = cli.parse_with_preset(Arguments, argv, program="jobs/train.py")
    if arguments.dry_run:
        from pipeline.training.task import dry_run

        return cli.as_result(dry_run(arguments.config))
    from pipeline.training.session import train_and_evaluate
