"""Which committed checkpoint a run goes on from, if the newest was damaged after the fact.

Ray Train's snapshot names the committed checkpoints of a run, and all workers start from its latest. A damaged one is
therefore taken out of the snapshot before they start: every rank then chooses the same, and Ray Train cannot delete the
folder of the checkpoint that is written again under the old one's name.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import WorldError
from pipeline.model_folder import META_FILE
from pipeline.training.checkpoint import checkpoint_name

__all__ = ["SNAPSHOT", "committed_checkpoints", "damage", "drop_damaged", "runs_root"]

logger = logging.getLogger(__name__)

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train notes which checkpoints are committed."""

_NAMES_IN_SNAPSHOT = ("validated", "timed_out_validation", "failed_validation")


def runs_root() -> str:
    """Where the folders of all runs lie."""
    return storage.join(storage.home(), "runs")


def drop_damaged(folder: str, *, patience_seconds: float = 0.0) -> bool:
    """Makes a run go on from its newest whole checkpoint, and says so in one line if that is not the latest.

    Reads the latest checkpoint once. Damage further back is looked at only when it is reached.

    Args:
        folder: The run's folder.
        patience_seconds: How long to wait for storage that is unreachable.

    Returns:
        Whether the snapshot was changed.

    Raises:
        WorldError: No committed checkpoint is whole; the damaged files are named.
    """
    location = storage.join(folder, SNAPSHOT)
    if not storage.exists(location):
        return False
    snapshot = _read(location, patience_seconds)
    names = _names(snapshot) if snapshot else _folders(folder)
    if not names:
        return False
    bad: list[str] = []
    while names and (reason := damage(storage.join(folder, names[-1]), patience_seconds=patience_seconds)):
        bad.append(reason)
        names.pop()
    if not names:
        raise WorldError(
            f"no checkpoint of {folder} is whole: {'; '.join(bad)}. Restore one of them from a copy, or choose "
            "another --name"
        )
    if snapshot and not bad:
        return False
    storage.write_bytes(location, json.dumps(_with_only(names, snapshot)).encode())
    why = "; ".join(bad) or f"{location} was cut short"
    logger.warning("going on from %s, the newest whole checkpoint: %s", names[-1], why)
    return True


def committed_checkpoints(folder: str) -> dict[int, str]:
    """Locations of a run's committed checkpoints by step, the latest last; none if the run is new."""
    location = storage.join(folder, SNAPSHOT)
    snapshot = _read(location, 0.0) if storage.exists(location) else None
    return {int(name[5:]): storage.join(folder, name) for name in _names(snapshot)} if snapshot else {}


def damage(checkpoint: str, *, patience_seconds: float = 0.0) -> str | None:
    """What is wrong with a checkpoint's files, naming one of them; None if it is whole.

    Args:
        checkpoint: Its folder.
        patience_seconds: How long to wait for storage that is unreachable.
    """
    meta = storage.join(checkpoint, META_FILE)
    try:
        files: Mapping[str, str] = json.loads(storage.read_bytes(meta, patience_seconds=patience_seconds))["files"]
        for name, expected in files.items():
            digest = hashlib.sha256()
            for chunk in storage.read_chunks(storage.join(checkpoint, name), patience_seconds=patience_seconds):
                digest.update(chunk)
            if digest.hexdigest() != expected:
                return f"{storage.join(checkpoint, name)} is damaged"
    except FileNotFoundError as error:
        return f"{error.filename or error} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{meta} is damaged"
    return None


def _read(location: str, patience_seconds: float) -> dict[str, Any] | None:
    """The snapshot; None if a controller died while it was writing it."""
    try:
        snapshot = json.loads(storage.read_bytes(location, patience_seconds=patience_seconds))
        _names(snapshot)
    except (ValueError, KeyError, TypeError):
        return None
    return dict(snapshot)


def _names(snapshot: Mapping[str, Any]) -> list[str]:
    """Folder names of the committed checkpoints, the latest last."""
    return [str(result["checkpoint_dir_name"]) for result in snapshot["checkpoint_results"]]


def _folders(folder: str) -> list[str]:
    """Folders that have a ``meta.json``, the newest last. Whole ones are as good as committed ones: a step's state is a
    function of the config, and which are whole is verified.
    """
    names = {location[len(folder) :].strip("/").split("/")[0] for location in storage.list_files(folder)}
    steps = sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())
    return [name for name in map(checkpoint_name, steps) if storage.exists(storage.join(folder, f"{name}/{META_FILE}"))]


def _with_only(names: list[str], snapshot: Mapping[str, Any] | None) -> dict[str, Any]:
    """A snapshot, in Ray Train's format, of these checkpoints alone."""
    old = {} if snapshot is None else {entry["checkpoint_dir_name"]: entry for entry in snapshot["checkpoint_results"]}
    entries = [old.get(name) or _entry(name) for name in names]
    indices = dict(zip(old, (snapshot or {}).get("checkpoint_report_indices", []), strict=False))
    return {
        **(snapshot or {}),
        "checkpoint_results": entries,
        "checkpoint_report_indices": [indices.get(name, place) for place, name in enumerate(names)],
        "latest_checkpoint_result": entries[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": (snapshot or {}).get("current_report_index", len(names)),
        **{f"{kind}_checkpoint_dir_names": [] for kind in _NAMES_IN_SNAPSHOT},
    }


def _entry(name: str) -> dict[str, Any]:
    return {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": int(name[5:])}}
