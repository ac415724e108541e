"""A run's whole state as a folder: weights, EMA, optimizer, step (design decision 1), and back.

Everything else a resumed run needs is a function of ``(seed, step)``.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import TrainConfig
from pipeline.diffusion.ema import Ema
from pipeline.errors import WorldError
from pipeline.model_folder import (
    EMA_FILE,
    average_files,
    load_tensors,
    read_meta,
    verified_bytes,
    write_meta,
    write_tensors,
)
from pipeline.provenance import code_record

__all__ = ["checkpoint_name", "load_checkpoint", "save_checkpoint", "save_published"]

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    *,
    unet: nn.Module,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainConfig,
    data: Mapping[str, Any],
) -> None:
    """Writes a resumable checkpoint after ``step`` optimizer steps."""
    write_tensors(folder, MODEL_FILE, unet.state_dict())
    write_tensors(folder, EMA_FILE, ema.state_dict())
    torch.save(optimizer.state_dict(), folder / OPTIMIZER_FILE)
    write_meta(folder, step=step, config=config, data=data, code=code_record())


def load_checkpoint(folder: Path, *, unet: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
    """Restores a run's state in place and returns the number of steps done.

    Raises:
        WorldError: A file is missing, truncated, or does not fit the network.
    """
    meta = read_meta(folder)
    try:
        unet.load_state_dict(load_tensors(folder, MODEL_FILE, meta))
        ema.load_state_dict(load_tensors(folder, EMA_FILE, meta))
        state = torch.load(
            io.BytesIO(verified_bytes(folder, OPTIMIZER_FILE, meta)), weights_only=True, map_location="cpu"
        )
        optimizer.load_state_dict(state)
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
