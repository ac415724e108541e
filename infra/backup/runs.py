"""The folders that runs resume from, copied while the runs go on."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bucket import Bucket

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train notes which checkpoints are committed; ``pipeline/training/committed.py`` reads it."""
_TRIES = 5


def save(store: Bucket, folder: Path) -> list[dict[str, Any]]:
    """Copies one run after the other, each with the checkpoints that its snapshot names."""
    found = []
    for run in store.folders(store.runs):
        found += _save_run(store, folder, run)
    return found + store.save(folder, [entry for entry in store.objects(store.runs, "/") if entry.key != store.runs])


def _save_run(store: Bucket, folder: Path, run: str) -> list[dict[str, Any]]:
    """Checkpoints first, then the snapshot, so that it names none that came later; again if it still does.

    Files that did not change since the last try are not copied again.
    """
    copied: dict[str, dict[str, Any]] = {}
    for _ in range(_TRIES):
        listed = store.objects(run)
        ordered = sorted(listed, key=lambda entry: entry.key.endswith(f"/{SNAPSHOT}"))
        for entry in ordered:
            if copied.get(entry.key, {}).get("etag") != entry.etag or entry.key.endswith(f"/{SNAPSHOT}"):
                for file in store.save(folder, [entry]):
                    copied[entry.key] = {**file, "etag": entry.etag}
        lacking = _lacking(folder, copied)
        if not lacking:
            break
    else:  # it is so in the bucket: a back-up of all the rest is worth having
        print(f"warning: {lacking} is not whole in s3://{store.name}", file=sys.stderr)
    return [{name: value for name, value in file.items() if name != "etag"} for file in copied.values()]


def _lacking(folder: Path, copied: dict[str, dict[str, Any]]) -> str:
    """A checkpoint that a copied snapshot names and the copy has not whole; empty if there is none."""
    for key in copied:
        if key.endswith(f"/{SNAPSHOT}"):
            try:
                names = [
                    entry["checkpoint_dir_name"]
                    for entry in json.loads((folder / key).read_text())["checkpoint_results"]
                ]
            except (ValueError, KeyError, TypeError):
                return key  # cut short: the next moment has the whole one
            if lacking := _not_whole(folder, copied, [f"{key.removesuffix(SNAPSHOT)}{name}" for name in names]):
                return lacking
    return ""


def _not_whole(folder: Path, copied: dict[str, dict[str, Any]], checkpoints: Iterable[str]) -> str:
    for checkpoint in checkpoints:
        try:
            files = json.loads((folder / checkpoint / "meta.json").read_text())["files"]
        except (OSError, ValueError, KeyError):
            return checkpoint
        if any(copied.get(f"{checkpoint}/{name}", {}).get("sha256") != sha256 for name, sha256 in files.items()):
            return checkpoint
    return ""
