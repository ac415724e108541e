"""Imports models of other libraries and exports ours to diffusers: ``python jobs/convert.py --help``."""

from dataclasses import dataclass
from typing import Any

from pipeline import cli
from pipeline.config import ConvertConfig


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Turn a model of another library into a model folder, or a model folder into one of diffusers."""

    config: ConvertConfig


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse(Arguments, argv, program="jobs/convert.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Converts; returns where the result lies and what it is."""
    config = parse_arguments(argv).config
    from pipeline.interop.session import convert

    converted = convert(config)
    return converted.to_json(), converted.text()


if __name__ == "__main__":
    cli.run_job(main)
