"""What a worker measures between two logging steps."""

import resource
import time

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.faults import TooMuchDamageError
from pipeline.training.task import TrainingTask
from pipeline.training.worker import HopelessError, Record, Worker

__all__ = ["Meter"]


class Meter:
    """Sums of one logging window, kept on the device: reading them, and so waiting for it, happens when logging."""

    def __init__(self, task: TrainingTask, worker: Worker, start: int, *, may_overflow: bool = False) -> None:
        self._worker = worker
        self._may_overflow = may_overflow
        self._data, self._order = task.config.data, task.order
        self._from_step = start
        self._bad: dict[int, int] = {}  # damaged images by epoch, of the epochs that the window touches
        self._bad_before = 0  # those of its first epoch that were counted in an earlier window
        self._started = time.perf_counter()
        self._waited = 0.0
        self._loss_sum = torch.zeros((), device=worker.device)
        self._grad_norm = torch.zeros((), device=worker.device)
        self._never = torch.tensor(2**62, device=worker.device)
        self._first_bad = self._never.clone()

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, num_bad: int) -> None:
        """Adds one step without waiting for the device.

        Args:
            step: The step, 0-based.
            loss: This worker's share of the global batch's mean loss, a scalar on the device.
            grad_norm: Norm of the gradient of the whole batch, a scalar on the device.
            num_bad: Damaged images in the worker's part.
        """
        epoch = step // self._order.batches_per_epoch
        self._bad[epoch] = self._bad.get(epoch, 0) + num_bad
        self._loss_sum += loss
        self._grad_norm = grad_norm
        bad = ~torch.isfinite(loss if self._may_overflow else loss + grad_norm)
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=step), self._first_bad)

    def summary(self, done: int, lr: float, wait_seconds: float) -> Record:
        """The window's metrics, the loss averaged over all workers; starts the next window. Every rank calls it.

        Raises:
            HopelessError: A loss or gradient of the window was not finite, or too much of the data is damaged; nothing
                of the window is logged or saved.
        """
        # The same epochs on all ranks, since all take the same steps.
        bad = torch.tensor([self._bad_before, *self._bad.values()], device=self._worker.device)
        if self._worker.num_workers > 1:
            dist.all_reduce(self._loss_sum)
            dist.all_reduce(self._first_bad, op=dist.ReduceOp.MIN)
            dist.all_reduce(bad)
        first_bad = int(self._first_bad)
        if first_bad < int(self._never):
            raise HopelessError(
                f"the loss or its gradient is not finite at step {first_bad}; the last checkpoint before it is kept. "
                f"Lower --lr or --grad-clip, or look at the images of that step"
            )
        bad_before, *bad_by_epoch = bad.tolist()
        if (worst := max(bad_by_epoch, default=0)) > self._data.max_bad_fraction * self._order.images_per_epoch:
            raise HopelessError(
                str(TooMuchDamageError(worst, self._order.images_per_epoch, self._data.max_bad_fraction))
            )
        num_steps = done - self._from_step
        seconds = time.perf_counter() - self._started
        record = {
            "step": done,
            "train/loss": float(self._loss_sum) / num_steps,
            "train/grad_norm": float(self._grad_norm),
            "train/lr": lr,
            "train/images_seen": done * self._data.batch_size,
            "perf/images_per_second": num_steps * self._data.batch_size / seconds,
            "perf/step_seconds": seconds / num_steps,
            "perf/data_wait_ratio": min(1.0, (wait_seconds - self._waited) / seconds),
            "perf/memory_bytes": _memory_bytes(self._worker.device),
            "data/bad_images": sum(bad_by_epoch) - bad_before,
        }
        self._from_step, self._waited = done, wait_seconds
        self._loss_sum.zero_()
        for finished in list(self._bad)[:-1]:
            del self._bad[finished]
        self._bad_before = sum(self._bad.values())
        self._started = time.perf_counter()
        return record


def _memory_bytes(device: torch.device) -> float:
    """Most memory that this worker has taken so far: of the GPU, else resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
