"""The loop of one worker, Ray or not: batch, noise, loss, backward, clip, step, EMA, log?, checkpoint?."""

import contextlib
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import draws
from pipeline.config import OptimizerConfig, TrainConfig, as_params, to_flat
from pipeline.data.loader import Batch, Loader
from pipeline.diffusion.averages import Averages
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.model_folder import build_schedule, build_unet, read_meta
from pipeline.training.arithmetic import Arithmetic, make_optimizer, settle_device
from pipeline.training.audit import AuditLog
from pipeline.training.checkpoint import RunState, Saver, load_checkpoint
from pipeline.training.initial import load_initial_weights
from pipeline.training.meter import Meter
from pipeline.training.objective import hidden_labels, image_losses
from pipeline.training.task import TrainingTask, differences
from pipeline.training.worker import HopelessError, Worker

__all__ = ["Prepared", "is_due", "learning_rate", "noise_of", "train"]

Prepared = tuple[Batch, Tensor, Tensor, Tensor | None]
"""A batch with its timesteps, noise and labels."""


def train(task: TrainingTask, worker: Worker, resume_from: Path | None = None) -> int:
    """Trains until the task's last step and returns the step reached.

    A run's state is (weights, EMA, optimizer, step). Images, flips, t, eps, hidden labels and dropout are functions of
    (seed, step) (dropout also of the rank), so nothing else is saved or restored.

    Args:
        task: The checked config and its data set.
        worker: This worker's place.
        resume_from: Folder of the checkpoint to go on from.

    Raises:
        HopelessError: The loss is not finite (the step is named), or ``resume_from`` belongs to another run.
        WorldError: A checkpoint or shard is damaged.
    """
    config = task.config
    settle_device(config.compute, worker.device, num_threads=config.cluster.cpus_per_worker)
    arithmetic = Arithmetic(config.compute, worker.device)
    schedule = build_schedule(config.diffusion).to(worker.device)
    unet = build_unet(config.model, seed=config.seed).to(worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if resume_from is None:
        load_initial_weights(unet, config)
    unet.train()
    if config.compute.compile:
        unet.compile()  # in place: the names of the weights stay
    model = worker.wrap(unet)
    _settle_buckets(model, task, worker, arithmetic)
    recipe = config.optimizer
    averages = Averages(unet, decay=recipe.ema_decay, warmup=recipe.ema_warmup, power=recipe.ema_power)
    optimizer = make_optimizer(unet, lr=recipe.lr, eps=recipe.adam_eps, device=worker.device)
    state = RunState(unet=unet, averages=averages, optimizer=optimizer, scaler=arithmetic.scaler)
    start = 0
    if resume_from:
        _check_same_run(task, resume_from)
        start = load_checkpoint(resume_from, state)
    parameters = list(unet.parameters())
    saver = Saver(task, worker, state)
    meter = Meter(task, worker, start, may_overflow=arithmetic.may_overflow)

    with _open_loader(task, worker, start) as loader, closing(_open_audit(config, worker)) as audit:
        for batch, t, eps, labels in loader:
            step = batch.step
            audit.note(batch, t, eps)
            if config.model.dropout > 0:
                torch.manual_seed(draws.torch_seed(config.seed, draws.Purpose.DROPOUT, step, worker.rank))
            optimizer.zero_grad(set_to_none=True)
            loss = _backward(model, schedule, config, _placed(batch.x_0, t, eps, labels, worker), arithmetic, worker)
            lr = learning_rate(recipe, step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            grad_norm = arithmetic.step(optimizer, parameters, recipe.grad_clip or math.inf)
            averages.update(unet, step)
            meter.add(step, loss, grad_norm, len(batch.bad))

            done = step + 1
            log_due = is_due(done, config.log_every, config.steps)
            checkpoint_due = is_due(done, config.checkpoint_every, config.steps) or (log_due and worker.must_save())
            if checkpoint_due or log_due:
                record = meter.summary(done, lr, loader.wait_seconds)
                if worker.rank == 0:
                    worker.log(record)
            if checkpoint_due:
                saver.save(done)
    return max(start, task.last_step)


def _backward(
    model: nn.Module,
    schedule: NoiseSchedule,
    config: TrainConfig,
    images: tuple[Tensor, Tensor, Tensor, Tensor | None],
    arithmetic: Arithmetic,
    worker: Worker,
) -> Tensor:
    """Computes the gradient of the mean loss over the global batch, in as many parts as ``micro_batch_size`` asks for.

    Workers may have different numbers of images: each divides the sum of its losses by the size of the whole batch, and
    the factor of ``num_workers`` undoes the average that data parallelism takes.

    Returns:
        This worker's share of the mean loss, a scalar on the device; the shares add up to it.
    """
    x_0, t, eps, labels = images
    count = math.ceil(len(x_0) / (config.compute.micro_batch_size or len(x_0)))
    total = torch.zeros((), device=worker.device)
    for number, part in enumerate(torch.arange(len(x_0)).tensor_split(count)):
        place = slice(int(part[0]), int(part[-1]) + 1)
        # Gradients are exchanged once, with the last part.
        is_last = number == count - 1 or worker.num_workers == 1
        with contextlib.nullcontext() if is_last else model.no_sync():  # type: ignore[operator]
            some_labels = None if labels is None else labels[place]
            with arithmetic.autocast():
                losses = image_losses(model, schedule, config, x_0[place], t[place], eps[place], some_labels)
            share = losses.sum() / config.data.batch_size
            arithmetic.backward(share * worker.num_workers)
        total += share.detach()
    return total


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


def _open_loader(task: TrainingTask, worker: Worker, start: int) -> Loader[Prepared]:
    def prepare(batch: Batch) -> Prepared:
        t, eps = noise_of(task.config, batch)
        labels = hidden_labels(task.config, batch)
        if worker.device.type == "cuda":
            # Only a copy from pinned memory runs beside the device's work.
            pinned = None if labels is None else labels.pin_memory()
            return replace(batch, x_0=batch.x_0.pin_memory()), t.pin_memory(), eps.pin_memory(), pinned
        return batch, t, eps, labels

    return Loader(
        task.location,
        task.manifest,
        task.order,
        task.config.data,
        rank=worker.rank,
        num_workers=worker.num_workers,
        start_step=start,
        end_step=task.last_step,
        finish=prepare,
    )


def _open_audit(config: TrainConfig, worker: Worker) -> AuditLog:
    return AuditLog(config.audit_dir, worker.rank, worker.num_workers)


def _placed(
    x_0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None, worker: Worker
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Images in channels_last, which the convolutions are fastest in, and numbers on the worker's device."""

    def images(tensor: Tensor) -> Tensor:
        return tensor.to(worker.device, non_blocking=True, memory_format=torch.channels_last)

    def numbers(tensor: Tensor) -> Tensor:
        return tensor.to(worker.device, non_blocking=True)

    return images(x_0), numbers(t), images(eps), None if labels is None else numbers(labels)


def _settle_buckets(model: nn.Module, task: TrainingTask, worker: Worker, arithmetic: Arithmetic) -> None:
    """Lets DDP rebuild its gradient buckets before the first step that counts.

    DDP rebuilds them at the second forward pass, and with three or more workers the order of summation depends on an
    element's place in its bucket. A resumed run would take its first step with the initial buckets and differ from the
    unbroken one in the last bits. Two passes whose gradients are thrown away make both begin alike.
    """
    if worker.num_workers == 1:
        return
    config = task.config.model
    x = torch.zeros(1, config.image_channels, config.image_size, config.image_size, device=worker.device)
    number = torch.zeros(1, dtype=torch.int64, device=worker.device)
    inputs = (x.contiguous(memory_format=torch.channels_last), number, *([number] if config.num_classes else []))
    for _ in range(2):
        with arithmetic.autocast():
            output = model(*inputs)
        (output.sum() * 0).backward()
    model.zero_grad(set_to_none=True)
