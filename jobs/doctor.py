"""Checks this set-up and says what to mend: ``python jobs/doctor.py --help``."""

from dataclasses import dataclass
from typing import Any

from pipeline import cli


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Check Ray, MLflow, storage, clocks, devices, memory, disks and versions, as the environment names them."""


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse(Arguments, argv, program="jobs/doctor.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Examines; exit code 1 if a job would fail."""
    parse_arguments(argv)
    from pipeline.doctor.session import examine

    found = examine()
    return found.to_json(), found.text()


if __name__ == "__main__":
    cli.run_job(main)
