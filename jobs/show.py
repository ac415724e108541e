"""Draws what schedules and models do, as PNG files and one page: ``python jobs/show.py --help``."""

from dataclasses import dataclass, field
from typing import Any

from pipeline import cli
from pipeline.config import ShowConfig


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Draw noise schedules, the forward process, and what a model does on its way from noise to images."""

    config: ShowConfig = field(default_factory=ShowConfig)


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse(Arguments, argv, program="jobs/show.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Draws; returns where the pictures lie."""
    config = parse_arguments(argv).config
    from pipeline.show.session import show

    shown = show(config)
    return shown.to_json(), shown.text()


if __name__ == "__main__":
    cli.run_job(main)
