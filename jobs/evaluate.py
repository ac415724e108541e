"""Measures published checkpoints against their data set: ``python jobs/evaluate.py --help``."""

from dataclasses import dataclass
from typing import Any

from pipeline import cli
from pipeline.config import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Generate images from published checkpoints and measure their distance from the data set."""

    config: EvaluateConfig


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse(Arguments, argv, program="jobs/evaluate.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Evaluates; returns the new results, newest checkpoint first."""
    config = parse_arguments(argv).config
    from pipeline.evaluation.session import evaluate_job

    outcome = evaluate_job(config)
    return outcome.to_json(), outcome.text()


if __name__ == "__main__":
    cli.run_job(main)
