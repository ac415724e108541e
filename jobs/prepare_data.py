"""Turns a collection of images into a data set of WebDataset shards: ``python jobs/prepare_data.py --help``."""

import logging
from dataclasses import dataclass, field
from typing import Any

from pipeline import cli, storage
from pipeline.config import PrepareConfig
from pipeline.data.prepare import prepare

logger = logging.getLogger("prepare_data")


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """Turn a collection of images into a data set of WebDataset shards."""

    config: PrepareConfig = field(default_factory=PrepareConfig)


def main(argv: list[str]) -> tuple[dict[str, Any], str]:
    """Prepares a data set; returns its location, digest and counts."""
    config = cli.parse(Arguments, argv, program="jobs/prepare_data.py").config
    result = prepare(config)
    manifest = result.manifest
    facts = {
        "location": result.location,
        "digest": manifest.digest,
        "num_images": manifest.num_images,
        "num_shards": len(manifest.shards),
        "shards_written": result.num_written,
        "seconds": round(result.seconds, 2),
    }
    done = "is ready" if result.num_written else "was already there"
    return facts, f"{result.location} {done}: {manifest.num_images} images in {len(manifest.shards)} shards"


if __name__ == "__main__":
    cli.run_job(main)
