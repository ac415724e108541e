"""Turns a collection of images into a data set of WebDataset shards: ``python jobs/prepare_data.py --help``."""

from dataclasses import dataclass, field
from typing import Any

from pipeline import cli
from pipeline.config import PrepareConfig
from pipeline.data.session import prepare_data


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Turn a collection of images into a data set of WebDataset shards, or index existing shards."""

    config: PrepareConfig = field(default_factory=PrepareConfig)


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse(Arguments, argv, program="jobs/prepare_data.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Prepares, indexes or verifies a data set; returns its location, digest and counts."""
    outcome = prepare_data(parse_arguments(argv).config)
    return outcome.to_json(), outcome.text()


if __name__ == "__main__":
    cli.run_job(main)
