"""What the loop knows of the place where it runs, so that it is the same with and without Ray."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import WorldError

__all__ = ["HopelessError", "Record", "Worker", "Write"]

Record = dict[str, float]
"""Metrics of one logging window by key, with ``step``: the number of optimizer steps done."""

Write = Callable[[str], None]
"""Writes a checkpoint into a folder of storage, given as location."""


class HopelessError(WorldError):
    """Trying again from the last checkpoint ends in the same way. Every rank raises it at the same step."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of the processes that train together."""

    rank: int
    num_workers: int
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module]
    """Makes the model data-parallel (identity for one worker)."""
    log: Callable[[Record], None]
    """Takes a record of metrics; called on rank 0 alone."""
    commit: Callable[[int, Write | None], None]
    """Takes (step, how to write the checkpoint); called on every rank, on rank 0 alone with the latter. Another thread
    may write."""
    must_save: Callable[[], bool] = lambda: False
    """Whether a checkpoint is wanted now, since a machine is about to be taken away; the same on every rank."""
