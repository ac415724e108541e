"""Results wait on the driver's disk until MLflow has them, so that none is lost whatever dies.

A run has a folder ``NAME-RUN/`` and each of its drivers a folder in it, named by the driver's number, with
``records.jsonl``, one metric record a line, and ``checkpoints/STEP/``, copies of what is to be published. The mailbox
writes the records and holds a lock on the file while it lives; the next driver sends what it finds in folders that
nobody holds.

Nothing is marked as sent: what MLflow has, it tells itself, and a mark beside it could only be wrong.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline import storage
from pipeline.tracking import TrackedRun

__all__ = ["CHECKPOINTS", "Leftovers", "Spool", "spool_folder"]

CHECKPOINTS = "checkpoints"
_RECORDS = "records.jsonl"


def spool_folder(run: TrackedRun) -> Path:
    """The folder of this driver of a run.

    It lies under ``$DDPM_HOME``, where a person looks for what belongs to a run and which is as durable as the run's
    checkpoints. An ``s3://`` home cannot take lines one by one and may be away together with MLflow: then it lies in
    the user's state folder. The run's id keeps runs of one name in different MLflow stores apart.
    """
    home = storage.home()
    if storage.is_remote(home):
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        home = str(Path(state) / "ddpm-ray")
    return Path(home) / "spool" / f"{run.name}-{run.run_id[:8]}" / str(run.driver_number)


class Spool:
    """The file that one mailbox appends to, locked for as long as its process lives."""

    def __init__(self, folder: Path) -> None:
        """Opens the file, made if missing; a mailbox that Ray has restarted finds what it had written.

        Raises:
            OSError: The folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / _RECORDS).open("a+b", buffering=0)
        _lock(self._file)
        self.records = list(_read(self._file))
        if self._file.seek(0, os.SEEK_END):
            self._file.write(b"\n")  # ends a line that a predecessor could not finish; empty lines are no records

    def append(self, record: dict[str, float]) -> None:
        """Adds a record in one write: it survives the end of every process, though not a power cut at once.

        Raises:
            OSError: The disk is full.
        """
        self._file.write(json.dumps(record).encode() + b"\n")


class Leftovers:
    """What earlier drivers of a run left and no living process holds."""

    def __init__(self, own: Path) -> None:
        """``own`` is this driver's folder; the others lie beside it."""
        self._own = own
        self._held: dict[Path, IO[bytes]] = {}

    def take(self) -> tuple[list[dict[str, float]], list[tuple[int, Path]]]:
        """Takes hold of folders that have become free.

        Returns:
            Their records, and (step, folder) of their checkpoints that are whole, both oldest first.
        """
        records: list[dict[str, float]] = []
        checkpoints: list[tuple[int, Path]] = []
        for folder in sorted(self._others(), key=lambda path: int(path.name)):
            file = (folder / _RECORDS).open("a+b", buffering=0)
            if not _lock(file):
                file.close()
                continue
            self._held[folder] = file
            records += _read(file)
            checkpoints += [(int(p.name), p) for p in folder.glob(f"{CHECKPOINTS}/*") if p.name.isdigit()]
        return records, sorted(checkpoints)

    def remove(self) -> None:
        """Deletes this driver's folder and those taken: MLflow has it all."""
        for folder in [self._own, *self._held]:
            shutil.rmtree(folder, ignore_errors=True)
        for file in self._held.values():
            file.close()
        self._held.clear()
        if self._own.parent.is_dir() and not any(self._own.parent.iterdir()):
            self._own.parent.rmdir()

    def _others(self) -> list[Path]:
        if not self._own.parent.is_dir():
            return []
        found = [path for path in self._own.parent.iterdir() if path.name.isdigit() and path.is_dir()]
        return [path for path in found if path != self._own and path not in self._held]


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: IO[bytes]) -> Iterator[dict[str, float]]:
    """The records of a file; a line that its writer did not live to finish is none."""
    file.seek(0)
    for line in file.read().splitlines():
        try:
            record: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            yield record
