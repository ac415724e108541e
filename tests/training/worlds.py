"""Runs the training loop without Ray: in this process, or in gloo processes of its own."""

import os
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline.config import PrepareConfig, TrainConfig, override
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.training.checkpoint import checkpoint_name
from pipeline.training.loop import train
from pipeline.training.task import TrainingTask, plan
from pipeline.training.worker import Record, Worker, Write


def small_task(folder: Path, **knobs: Any) -> TrainingTask:
    """Digits in several shards and a network of a few thousand parameters."""
    location = str(folder / "digits")
    prepare(open_source("digits"), PrepareConfig(images_per_shard=500), location)
    base = {"data": location, "base_channels": 8, "batch_size": 12, "num_streams": 12, "steps": 8, "sampling_steps": 5}
    config = override(TrainConfig(), base | {"checkpoint_every": 4, "log_every": 2, "num_workers": 1} | knobs)
    return plan(config)


def with_knobs(task: TrainingTask, **knobs: Any) -> TrainingTask:
    """The same task with other knobs."""
    return replace(task, config=override(task.config, knobs))


def run_one(task: TrainingTask, out: Path, resume_from: Path | None = None) -> list[Record]:
    """Trains in this process with one worker; checkpoints are copied to ``out``; returns the records."""
    records: list[Record] = []
    worker = _worker(0, 1, out, nn.Identity(), records)
    train(task, replace(worker, wrap=lambda model: model), resume_from)
    return records


def run_world(task: TrainingTask, num_workers: int, out: Path, resume_from: Path | None = None) -> None:
    """Trains in ``num_workers`` processes over gloo."""
    task = with_knobs(task, num_workers=num_workers)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (num_workers, port, task.to_json(), str(out), str(resume_from) if resume_from else None)
    mp.spawn(_process, arguments, nprocs=num_workers)


def _process(rank: int, num_workers: int, port: int, task: str, out: str, resume_from: str | None) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=num_workers, timeout=timedelta(seconds=60))
    worker = _worker(rank, num_workers, Path(out), None, [])
    train(TrainingTask.from_json(task), worker, Path(resume_from) if resume_from else None)
    dist.destroy_process_group()


def _worker(rank: int, num_workers: int, out: Path, _model: Any, records: list[Record]) -> Worker:
    def commit(step: int, write: Write | None) -> None:
        if write is not None:
            write(str(out / checkpoint_name(step)))
        if num_workers > 1:
            dist.barrier()

    def wrap(model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    return Worker(
        rank=rank,
        num_workers=num_workers,
        device=torch.device("cpu"),
        wrap=wrap,
        log=records.append,
        commit=commit,
    )
