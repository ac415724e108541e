"""The loop of one worker, Ray or not: batch, noise, loss, backward, clip, step, EMA, log?, checkpoint?."""

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import draws
from pipeline.config import OptimizerConfig, TrainConfig, as_params, to_flat
from pipeline.data.faults import TooMuchDamageError
from pipeline.data.loader import Batch, Loader
from pipeline.diffusion.ema import Ema
from pipeline.diffusion.process import q_sample, simple_loss
from pipeline.errors import WorldError
from pipeline.model_folder import build_schedule, build_unet, read_meta
from pipeline.training.audit import AuditLog
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.task import TrainingTask, differences

__all__ = ["HopelessError", "Record", "Worker", "is_due", "learning_rate", "noise_of", "train"]

Record = dict[str, float]
"""Metrics of one logging window by key, with ``step``: the number of optimizer steps done."""


class HopelessError(WorldError):
    """Trying again from the last checkpoint ends in the same way. Every rank raises it at the same step."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What the loop needs to know of the place where it runs."""

    rank: int
    num_workers: int
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module]
    """Makes the model data-parallel (identity for one worker)."""
    log: Callable[[Record], None]
    """Takes a record of metrics; called on rank 0 alone."""
    commit: Callable[[int, Path | None], None]
    """Takes (step, checkpoint folder); called on every rank, with a folder on rank 0 alone; a barrier."""


def train(task: TrainingTask, worker: Worker, resume_from: Path | None = None) -> int:
    """Trains until ``steps`` and returns the step reached.

    A run's state is (weights, EMA, optimizer, step). Images, flips, t, eps and dropout are functions of (seed, step)
    (dropout also of the rank), so nothing else is saved or restored.

    Args:
        task: The checked config and its data set.
        worker: This worker's place.
        resume_from: Folder of the checkpoint to go on from.

    Raises:
        HopelessError: The loss is not finite (the step is named), or ``resume_from`` belongs to another run.
        WorldError: A checkpoint or shard is damaged.
    """
    config = task.config
    torch.set_num_threads(config.cluster.cpus_per_worker)
    schedule = build_schedule(config.diffusion).to(worker.device)
    unet = build_unet(config.model, seed=config.seed).to(worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = worker.wrap(unet)
    model.train()
    _settle_buckets(model, task, worker)
    ema = Ema(unet, decay=config.optimizer.ema_decay, warmup=config.optimizer.ema_warmup)
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.optimizer.lr, eps=config.optimizer.adam_eps)
    start = 0
    if resume_from:
        _check_same_run(task, resume_from)
        start = load_checkpoint(resume_from, unet=unet, ema=ema, optimizer=optimizer)
    meter = Meter(task, worker, start)

    with _open_loader(task, worker, start) as loader, closing(_open_audit(config, worker)) as audit:
        for batch, t, eps in loader:
            step = batch.step
            audit.note(batch, t, eps)
            t, eps = t.to(worker.device, non_blocking=True), _place(eps, worker)
            x_t = q_sample(schedule, _place(batch.x_0, worker), t, eps)
            if config.model.dropout > 0:
                torch.manual_seed(draws.torch_seed(config.seed, draws.Purpose.DROPOUT, step, worker.rank))
            loss = simple_loss(eps, model(x_t, t)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            grad_norm = nn.utils.clip_grad_norm_(unet.parameters(), config.optimizer.grad_clip or math.inf)
            lr = learning_rate(config.optimizer, step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            ema.update(unet, step)
            meter.add(step, loss.detach(), grad_norm.detach(), len(batch.bad))

            done = step + 1
            checkpoint_due = is_due(done, config.checkpoint_every, config.steps)
            if checkpoint_due or is_due(done, config.log_every, config.steps):
                record = meter.summary(done, lr, loader.wait_seconds)
                if worker.rank == 0:
                    worker.log(record)
            if checkpoint_due:
                _checkpoint(task, worker, unet, ema, optimizer, done)
                meter.restart()
    return max(start, config.steps)


def _check_same_run(task: TrainingTask, checkpoint: Path) -> None:
    """The checkpoint itself says what it is of: MLflow may be another store than the one the run began with."""
    meta = read_meta(checkpoint)
    changed = differences(task.config, as_params(to_flat(meta.config)))
    if meta.data["digest"] != task.manifest.digest:
        changed.append(f"the data set's digest was {meta.data['digest'][:12]}, now {task.manifest.digest[:12]}")
    if changed:
        raise HopelessError(f"{checkpoint} belongs to another run: {'; '.join(changed)}; choose another --name")


def is_due(done: int, every: int, last: int) -> bool:
    """Whether something periodic happens after ``done`` steps: every ``every`` steps and after the last one."""
    return done % every == 0 or done == last


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step (0-based): linear warm-up from 0 at step 0, as the paper's code, then the decay."""
    warmup = min(step / config.lr_warmup_steps, 1.0) if config.lr_warmup_steps else 1.0
    if config.lr_decay == "constant" or step < config.lr_warmup_steps:
        return config.lr * warmup
    progress = (step - config.lr_warmup_steps) / max(1, steps - config.lr_warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def noise_of(config: TrainConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """The timesteps and noise of a worker's part of a global batch, drawn per stream from (seed, step, stream).

    Returns:
        t, int64 [b], uniform in [0, T), and eps, float32 [b, C, H, W], standard normal; on the CPU, so that every
        device trains on the same numbers.
    """
    shape = (len(batch.x_0) // len(batch.streams), *batch.x_0.shape[1:])
    T, seed, step = config.diffusion.T, config.seed, batch.step
    t = [draws.integers(shape[0], T, seed, draws.Purpose.TIMESTEP, step, stream) for stream in batch.streams]
    eps = [draws.standard_normal(shape, seed, draws.Purpose.NOISE, step, stream) for stream in batch.streams]
    return torch.cat(t), torch.cat(eps)


class Meter:
    """Sums of one logging window, kept on the device: reading them, and so waiting for it, happens when logging."""

    def __init__(self, task: TrainingTask, worker: Worker, start: int) -> None:
        self._worker = worker
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
        """Adds one step without waiting for the device."""
        epoch = step // self._order.batches_per_epoch
        self._bad[epoch] = self._bad.get(epoch, 0) + num_bad
        self._loss_sum += loss
        self._grad_norm = grad_norm
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
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
            "train/loss": float(self._loss_sum) / num_steps / self._worker.num_workers,
            "train/grad_norm": float(self._grad_norm),
            "train/lr": lr,
            "train/images_seen": done * self._data.batch_size,
            "perf/images_per_second": num_steps * self._data.batch_size / seconds,
            "perf/step_seconds": seconds / num_steps,
            "perf/data_wait_ratio": min(1.0, (wait_seconds - self._waited) / seconds),
            "data/bad_images": sum(bad_by_epoch) - bad_before,
        }
        self._from_step, self._waited = done, wait_seconds
        self._loss_sum.zero_()
        for finished in list(self._bad)[:-1]:
            del self._bad[finished]
        self._bad_before = sum(self._bad.values())
        self.restart()
        return record

    def restart(self) -> None:
        """Starts the window's clock now, so that writing a checkpoint is not counted as training."""
        self._started = time.perf_counter()


def _open_loader(task: TrainingTask, worker: Worker, start: int) -> "Loader[tuple[Batch, Tensor, Tensor]]":
    def with_noise(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        t, eps = noise_of(task.config, batch)
        if worker.device.type == "cuda":
            # Only a copy from pinned memory runs beside the device's work.
            return replace(batch, x_0=batch.x_0.pin_memory()), t.pin_memory(), eps.pin_memory()
        return batch, t, eps

    return Loader(
        task.location,
        task.manifest,
        task.order,
        task.config.data,
        rank=worker.rank,
        num_workers=worker.num_workers,
        start_step=start,
        end_step=task.config.steps,
        finish=with_noise,
    )


def _open_audit(config: TrainConfig, worker: Worker) -> AuditLog:
    return AuditLog(config.audit_dir, worker.rank, worker.num_workers)


def _place(images: Tensor, worker: Worker) -> Tensor:
    return images.to(worker.device, non_blocking=True, memory_format=torch.channels_last)


def _settle_buckets(model: nn.Module, task: TrainingTask, worker: Worker) -> None:
    """Lets DDP rebuild its gradient buckets before the first step that counts.

    DDP rebuilds them at the second forward pass, and with three or more workers the order of summation depends on an
    element's place in its bucket. A resumed run would take its first step with the initial buckets and differ from the
    unbroken one in the last bits. Two passes whose gradients are thrown away make both begin alike.
    """
    if worker.num_workers == 1:
        return
    config = task.config.model
    x = torch.zeros(1, config.image_channels, config.image_size, config.image_size, device=worker.device)
    t = torch.zeros(1, dtype=torch.int64, device=worker.device)
    for _ in range(2):
        (model(x.contiguous(memory_format=torch.channels_last), t).sum() * 0).backward()
    model.zero_grad(set_to_none=True)


def _checkpoint(
    task: TrainingTask, worker: Worker, unet: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, step: int
) -> None:
    if worker.rank != 0:
        worker.commit(step, None)
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as name:
        save_checkpoint(
            Path(name), unet=unet, ema=ema, optimizer=optimizer, step=step, config=task.config, data=task.data_record
        )
        worker.commit(step, Path(name))
