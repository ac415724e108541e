"""The proof of what was trained on: each worker notes images, timesteps and noise of every step.

    {"step": 12, "keys": [...], "t": [...], "eps_sha256": [...]}

One value for each image of the worker's part of the global batch; ``eps_sha256`` is over the float32 noise in the
order C, H, W. Where an image was damaged and another took its place, ``bad`` says so. Concatenating the lines of a step
in the order of the ranks gives the global batch, the same for every number of workers.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO

from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.errors import WorldError

__all__ = ["AuditLog"]


class AuditLog:
    """Appends lines to ``DIR/rank-RRRRR-of-NNNNN.jsonl``. A run that is continued adds to the same files.

    Args:
        folder: A local folder; None: nothing is written.
        rank: This worker.
        num_workers: All workers.

    Raises:
        WorldError: The folder cannot be written.
    """

    def __init__(self, folder: str | None, rank: int, num_workers: int) -> None:
        """Opens the file."""
        self._file: IO[str] | None = None
        if folder is None:
            return
        path = Path(folder).expanduser() / f"rank-{rank:05d}-of-{num_workers:05d}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_half_line(path)
            self._file = path.open("a", buffering=1)
        except OSError as error:
            raise WorldError(
                f"--audit-dir {folder}: {error.strerror or error}; give a folder that can be written"
            ) from error

    def note(self, batch: Batch, t: Tensor, eps: Tensor) -> None:
        """Notes one step.

        Args:
            batch: The worker's part of the global batch.
            t: Timesteps, int64 [b].
            eps: Noise, float32 [b, C, H, W], on the CPU.
        """
        if self._file is None:
            return
        noise = [hashlib.sha256(each.contiguous().numpy().tobytes()).hexdigest() for each in eps]
        record = {"step": batch.step, "keys": batch.keys, "t": t.tolist(), "eps_sha256": noise}
        if batch.bad:
            record["bad"] = batch.bad
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _drop_half_line(path: Path) -> None:
    """A worker killed in mid-write leaves half a line. No checkpoint covers its step, so that it comes again."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 2**16)
            file.seek(start)
            end = start + file.read(end - start).rfind(b"\n") + 1
            if end > start:
                break
        file.truncate(end)
