"""Trains a DDPM on Ray, or continues a run by its name: ``python jobs/train.py --help``."""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from pipeline import cli
from pipeline.config import EvaluateConfig, ProtocolConfig, Switch, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Train a DDPM on Ray, or continue a run by its --name."""

    dry_run: Switch = False
    """Print what would be done and what it needs; start nothing."""
    evaluate: Switch = False
    """Evaluate the last checkpoint when training is done."""
    config: TrainConfig = field(default_factory=TrainConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse_with_preset(Arguments, argv, program="jobs/train.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Trains; returns what a person wants to know of the run."""
    arguments = parse_arguments(argv)
    if arguments.dry_run:
        from pipeline.training.task import dry_run

        facts = dry_run(arguments.config)
        return asdict(facts), facts.text()
    from pipeline.evaluation.evaluator import evaluate_last
    from pipeline.evaluation.quality import RoughDistance
    from pipeline.training.session import train_run

    config = arguments.config
    then = partial(evaluate_last, EvaluateConfig.after(config, arguments.protocol)) if arguments.evaluate else None
    run = train_run(config, then=then, measure=RoughDistance.of(config), live=not arguments.json)
    return run.to_json(), run.text()


if __name__ == "__main__":
    cli.run_job(main)
