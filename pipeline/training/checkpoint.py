"""A run's whole state as a folder: weights, EMA, optimizer, step (design decision 1), and back.

Everything else a resumed run needs is a function of ``(seed, step)``.
"""

import io
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.diffusion.averages import Averages
from pipeline.errors import WorldError
from pipeline.model_folder import (
    META_FILE,
    MODEL_FILE,
    average_file,
    average_files,
    encode_meta,
    encode_tensors,
    load_tensors,
    read_meta,
    verified_bytes,
    write_meta,
)
from pipeline.provenance import code_record
from pipeline.training.task import TrainingTask
from pipeline.training.worker import Worker

__all__ = ["RunState", "Saver", "checkpoint_name", "load_checkpoint", "save_published"]

OPTIMIZER_FILE = "optimizer.pt"
SCALER_FILE = "scaler.json"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What is saved and restored."""

    unet: nn.Module
    averages: Averages
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def to_dict(self) -> dict[str, Any]:
        """The live tensors and numbers, not copied."""
        return {
            "model": self.unet.state_dict(),
            "averages": self.averages.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),  # empty unless the precision is fp16
        }


class Saver:
    """Copies the state between two steps and leaves the writing to another thread.

    A step waits for the copy alone: for storage only if the checkpoint before is still not written. The copy's memory,
    as much as the state takes, is kept and used again.
    """

    def __init__(self, task: TrainingTask, worker: Worker, state: RunState) -> None:
        self._task, self._worker, self._state = task, worker, state
        self._copies: dict[str, Tensor] = {}
        self._is_free = threading.Event()
        self._is_free.set()

    def save(self, step: int) -> None:
        """Saves the state after ``step`` steps. Every rank calls it; the first writes."""
        if self._worker.rank != 0:
            self._worker.commit(step, None)
            return
        self._is_free.wait()
        snapshot = self._copied(self._state.to_dict(), "")
        if self._worker.device.type == "cuda":
            torch.cuda.synchronize()
        self._is_free.clear()

        def write(location: str) -> None:
            try:
                self._write(snapshot, step, location)
            finally:
                self._is_free.set()

        try:
            self._worker.commit(step, write)
        except BaseException:
            self._is_free.set()
            raise

    def _copied(self, value: Any, path: str) -> Any:
        """Copies tensors into memory of the host, within whatever dicts and lists they are."""
        if isinstance(value, Mapping):
            return {key: self._copied(each, f"{path}/{key}") for key, each in value.items()}
        if isinstance(value, list):
            return [self._copied(each, f"{path}/{index}") for index, each in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        copy = self._copies.get(path)
        if copy is None:
            # Pinned: the GPU copies at full speed, all tensors on their way at the same time.
            pinned = self._worker.device.type == "cuda"
            copy = self._copies[path] = torch.empty_like(value, device="cpu", pin_memory=pinned)
        return copy.copy_(value.detach(), non_blocking=True)

    def _write(self, snapshot: dict[str, Any], step: int, location: str) -> None:
        """``meta.json`` comes last and holds the checksums: without it there is no checkpoint."""
        checksums: dict[str, str] = {}
        config = self._task.config

        def put(name: str, data: bytes) -> None:
            patience = config.data.storage_patience_seconds
            storage.write_bytes(storage.join(location, name), data, patience_seconds=patience)
            checksums[name] = storage.sha256_hex(data)

        put(MODEL_FILE, encode_tensors(snapshot["model"]))
        for stem, tensors in snapshot["averages"].items():
            put(average_file(stem), encode_tensors(tensors))
        buffer = io.BytesIO()
        torch.save(snapshot["optimizer"], buffer)
        put(OPTIMIZER_FILE, buffer.getvalue())
        if snapshot["scaler"]:
            put(SCALER_FILE, json.dumps(snapshot["scaler"]).encode())
        files = dict(sorted(checksums.items()))
        put(
            META_FILE,
            encode_meta(step=step, config=config, data=self._task.data_record, code=code_record(), files=files),
        )


def load_checkpoint(folder: Path, state: RunState) -> int:
    """Restores a run's state in place and returns the number of steps done.

    Raises:
        WorldError: A file is missing, truncated, or does not fit the network.
    """
    meta = read_meta(folder)
    try:
        state.unet.load_state_dict(load_tensors(folder, MODEL_FILE, meta))
        stems = state.averages.tensors()
        state.averages.load({stem: load_tensors(folder, average_file(stem), meta) for stem in stems})
        optimizer = torch.load(
            io.BytesIO(verified_bytes(folder, OPTIMIZER_FILE, meta)), weights_only=True, map_location="cpu"
        )
        state.optimizer.load_state_dict(optimizer)
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(json.loads(verified_bytes(folder, SCALER_FILE, meta)))
    except (RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, WorldError):
            raise
        raise WorldError(f"checkpoint {folder} does not fit this network: {str(error).splitlines()[0]}") from error
    return meta.step


def save_published(checkpoint: Path, folder: Path) -> int:
    """Copies what is published (averages and ``meta.json``) out of a checkpoint, verified; returns its step."""
    meta = read_meta(checkpoint)
    for name in average_files(meta.config.optimizer):
        (folder / name).write_bytes(verified_bytes(checkpoint, name, meta))
    write_meta(folder, step=meta.step, config=meta.config, data=meta.data, code=meta.code)
    return meta.step
