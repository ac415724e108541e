"""Turns a collection of images into a data set of WebDataset shards: ``python jobs/prepare_data.py --help``."""

from dataclasses import dataclass, field
from typing import Any

from pipeline import cli
from pipeline.config import PrepareConfig
from pipeline.data.session import prepare_data


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Turn a collection of images into a data set of WebDataset shards."""

    config: PrepareConfig = field(default_factory=PrepareConfig)


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line."""
    return cli.parse(Arguments, argv, program="jobs/prepare_data.py")


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Prepares a data set; returns its location, digest and counts."""
    result = prepare_data(parse_arguments(argv).config)
    manifest = result.manifest
    facts = {
        "location": result.location,
        "digest": manifest.digest,
        "num_images": manifest.num_images,
        "num_shards": len(manifest.shards),
        "shards_written": result.num_written,
        "seconds": round(result.seconds, 2),
    }
    state = "is ready" if result.num_written else "was already there"
    return facts, f"{result.location} {state}: {manifest.num_images:,} images in {len(manifest.shards)} shards"


if __name__ == "__main__":
    cli.run_job(main)
