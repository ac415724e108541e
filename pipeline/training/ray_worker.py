"""What runs in each of Ray Train's workers: the loop, with Ray's ways to log, to commit and to fail."""

from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn

from pipeline import storage
from pipeline.data.faults import DataError, TooMuchDamageError
from pipeline.errors import WorldError
from pipeline.training.checkpoint import checkpoint_name
from pipeline.training.committed import damage, runs_root
from pipeline.training.loop import train
from pipeline.training.task import TrainingTask
from pipeline.training.worker import HopelessError, Record, Worker, Write

__all__ = ["run_worker"]

_POST_SECONDS = 60.0


class _DamagedError(WorldError):
    """The checkpoint to go on from is not whole; the driver can choose another."""


def run_worker(inputs: dict[str, Any]) -> int | str:
    """Runs in each Ray Train worker; returns the step reached, or why training cannot go on."""
    context = ray.train.get_context()
    mailbox = inputs["mailbox"]
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)

    def wrap(model: nn.Module) -> nn.Module:
        return ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})

    on_their_way: list[Any] = []

    def log(record: Record) -> None:
        on_their_way.append(mailbox.put.remote(record))

    def commit(step: int, write: Write | None) -> None:
        # Steps before a checkpoint are not done again: their records have to be on the driver's disk first.
        if on_their_way:
            ray.wait(on_their_way, num_returns=len(on_their_way), timeout=_POST_SECONDS)
            on_their_way.clear()
        _report(step, write, storage.join(runs_root(), str(task.config.name)), mailbox)

    task = TrainingTask.from_json(inputs["task"])
    worker = Worker(
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
        device=device,
        wrap=wrap,
        log=log,
        commit=commit,
        must_save=_Notices().are_new,
    )
    checkpoint = ray.train.get_checkpoint()
    verdict = cast(Any, ray).get(mailbox.verdict.remote())
    if verdict is not None:
        return str(verdict)
    try:
        if checkpoint is None:
            return train(task, worker)
        with checkpoint.as_directory() as folder:
            if reason := damage(folder):
                raise _DamagedError(reason)
            return train(task, worker, Path(folder))
    except HopelessError as error:
        # Not raised: Ray Train would start again from the last checkpoint, and it would end in the same way.
        return str(error)
    except (DataError, TooMuchDamageError, _DamagedError) as error:
        # Only this rank knows, and the others wait for it: they are ended by raising. When Ray Train starts all of them
        # again, they find the verdict.
        cast(Any, ray).get(mailbox.give_up.remote(str(error)))
        raise


class _Notices:
    """What Ray was told of nodes that will be taken away, such as spot instances."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def are_new(self) -> bool:
        """Whether a node of the group was announced since the last call. Every rank asks, and gets the same answer."""
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info else set()
        self._known |= new
        return bool(new)


def _report(step: int, write: Write | None, run_folder: str, mailbox: Any) -> None:
    """Reports a checkpoint that Ray Train's upload thread writes while training goes on.

    Written through ``storage``, which waits while S3 is away; Ray Train itself gives up after three attempts. Ray
    commits the checkpoint once the function has returned.
    """
    name = checkpoint_name(step)
    context = ray.train.get_context().get_storage()
    destination = Checkpoint(context.build_checkpoint_path_from_name(name), context.storage_filesystem)

    def upload(checkpoint: Checkpoint, _name: str) -> Checkpoint:
        assert write is not None
        try:
            write(storage.join(run_folder, name))
        except WorldError as error:
            # A full disk is full at the next try as well.
            cast(Any, ray).get(mailbox.give_up.remote(f"the checkpoint of step {step} cannot be saved: {error}"))
            raise
        return checkpoint

    ray.train.report(
        {"step": step},
        checkpoint=destination if write else None,
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=False,  # "local" is the destination itself
    )
