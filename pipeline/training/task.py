"""What a training run will do, worked out and checked before anything starts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import storage
from pipeline.config import TrainConfig, as_params, changes, from_flat, to_flat
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.order import StreamOrder
from pipeline.data.read_plan import ReadPlan, plan_reading
from pipeline.diffusion.unet import num_parameters
from pipeline.errors import UserError
from pipeline.generation import check_sampling
from pipeline.model_folder import build_schedule, build_unet
from pipeline.training.initial import check_initial_weights

__all__ = ["DryRun", "TrainingTask", "check_model", "differences", "dry_run", "plan"]

# Knobs that may change when a run is continued: where and how long it runs, not what a step computes. With a decaying
# learning rate the steps still to come follow the new end.
_MAY_CHANGE = {
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "grid_images",
    "audit_dir",
    "loader_workers",
    "decode_threads",
    "loader_cache_bytes",
    "prefetch_batches",
    "cache_dir",
    "cache_bytes",
    "on_bad_data",
    "max_bad_fraction",
    "storage_patience_seconds",
    "num_workers",
    "use_gpu",
    "cpus_per_worker",
    "max_failures",
    "resize_seconds",
    "worker_timeout_seconds",
    "quality_images",
    "quality_gpus",
    "micro_batch_size",
    "compile",
    "data",  # compared by digest, so that a data set may move
    "sampler",
    "sampling_steps",
    "timestep_spacing",
    "eta",
    "variance",
    "x0_clipping",
    "x0_percentile",
    "sample_seed",
    "guidance",
    "allow_signal_at_T",
    "preset",
    "name",
    "experiment",
}


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A checked config and the data set it trains on; crosses to the workers as JSON."""

    config: TrainConfig
    location: str
    manifest: Manifest
    until: int | None = None
    """Where this part of the training ends, a multiple of ``checkpoint_every``; None: with the last step."""

    @property
    def last_step(self) -> int:
        """The step that this part of the training reaches; what a step computes does not depend on it."""
        return self.config.steps if self.until is None else min(self.until, self.config.steps)

    @property
    def order(self) -> StreamOrder:
        """Which images are in which global batch."""
        return StreamOrder(
            shard_sizes=tuple(shard.num_images for shard in self.manifest.shards),
            batch_size=self.config.data.batch_size,
            num_streams=self.config.data.num_streams,
            seed=self.config.seed,
        )

    @property
    def data_record(self) -> dict[str, Any]:
        """The data set in the words of ``meta.json``."""
        return {
            "location": self.location,
            "digest": self.manifest.digest,
            "num_images": self.manifest.num_images,
            "class_names": list(self.manifest.class_names),
        }

    def read_plan(self) -> ReadPlan:
        """How each worker reads the data set, and what memory that takes; UserError if the disk cache is too small."""
        workers = self.config.cluster.min_workers
        return plan_reading(self.config.data, self.manifest, self.location, num_workers=workers)

    def to_json(self) -> str:
        """The task as JSON text."""
        record = {"config": to_flat(self.config), "location": self.location, "manifest": self.manifest.to_json()}
        return json.dumps(record | {"until": self.until})

    @classmethod
    def from_json(cls, text: str) -> "TrainingTask":
        """The inverse of ``to_json``."""
        record = json.loads(text)
        return cls(
            config=from_flat(TrainConfig, record["config"]),
            location=record["location"],
            manifest=Manifest.from_json(record["manifest"]),
            until=record["until"],
        )


def plan(config: TrainConfig) -> TrainingTask:
    """Checks a config against its data set, schedule and network.

    Raises:
        UserError: The data set is missing, half-written, of another shape or has other classes; the schedule or network
            is refused.
    """
    check_model(config)
    location = storage.resolve(config.data.data, "data")
    task = TrainingTask(config=config, location=location, manifest=load_manifest(location))
    model, manifest = config.model, task.manifest
    if (manifest.image_size, manifest.image_channels) != (model.image_size, model.image_channels):
        raise UserError(
            f"{location} holds {manifest.image_channels}x{manifest.image_size}x{manifest.image_size} images, "
            f"the model takes {model.image_channels}x{model.image_size}x{model.image_size}; "
            f"give --image-size {manifest.image_size} --image-channels {manifest.image_channels} (and a network that "
            "suits them), or prepare the data set anew"
        )
    _check_classes(task)
    check_initial_weights(config)
    assert task.order.batches_per_epoch > 0
    task.read_plan()
    return task


def _check_classes(task: TrainingTask) -> None:
    """A class that is never seen in training would be sampled all the same; one beyond the table has no vector."""
    told, found = task.config.model.num_classes, len(task.manifest.class_names)
    if told and not found:
        raise UserError(f"--num-classes {told}: {task.location} has no labels; give 0, or prepare it with labels")
    if told and told != found:
        raise UserError(f"--num-classes {told}: {task.location} has {found} classes; give {found}, or 0 to ignore them")


def differences(config: TrainConfig, params: Mapping[str, str]) -> list[str]:
    """What would make a continued run another one, in words.

    Args:
        config: The config of now.
        params: The config of then as MLflow keeps it: text by leaf name. Unknown and missing names do not count.
    """
    return changes(as_params(to_flat(config)), params, allowed=_MAY_CHANGE)


def check_model(config: TrainConfig) -> int:
    """Checks schedule and network, and returns the number of parameters."""
    build_schedule(config.diffusion)
    check_sampling(config.sampling, config)
    with torch.device("meta"):
        return num_parameters(build_unet(config.model))


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What ``--dry-run`` tells."""

    config: Mapping[str, Any]
    parameters: int
    signal_at_T: float
    """sqrt(alpha_bar_T): what is left of the image in x_T."""
    data_location: str
    data_found: bool
    images: int | None
    images_per_epoch: int | None
    steps_per_epoch: int | None
    state_bytes: int
    """Weights, gradients, two Adam moments and the EMA, in each worker."""
    activation_bytes: int
    """Tensors that autograd keeps for one worker's part of the batch."""
    loader_bytes: int
    """Bound of the loader in each worker."""
    loader_formula: str
    """What the bound is made of."""

    def text(self) -> str:
        """The facts for a person, after all knobs."""
        images = (
            "not prepared yet" if self.images is None else f"{self.images:,} images, {self.steps_per_epoch:,} steps"
        )
        total = self.state_bytes + self.activation_bytes + self.loader_bytes
        lines = [f"{name:<24} {value}" for name, value in self.config.items()]
        lines += [
            "",
            f"parameters               {self.parameters:,}",
            f"sqrt(alpha_bar_T)        {self.signal_at_T:.5f}  (signal left in x_T)",
            f"data set                 {self.data_location}",
            f"an epoch                 {images}",
            f"memory of a worker       about {_mebibytes(total)}: state {_mebibytes(self.state_bytes)}, "
            f"activations {_mebibytes(self.activation_bytes)}, loader at most {_mebibytes(self.loader_bytes)}",
            f"loader of a worker       {self.loader_formula}",
        ]
        return "\n".join(lines)


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def dry_run(config: TrainConfig) -> DryRun:
    """Works out what a run would do and need; reads only the data set's manifest, if there is one.

    Raises:
        UserError: As ``plan``, but a data set that is not there yet is no error.
    """
    parameters = check_model(config)
    location = storage.resolve(config.data.data, "data")
    found = storage.exists(storage.join(location, "manifest.json"))
    task = plan(config) if found else None
    order = task.order if task else None
    reading = task.read_plan() if task else None
    return DryRun(
        config=to_flat(config),
        parameters=parameters,
        signal_at_T=build_schedule(config.diffusion).signal_at_T,
        data_location=location,
        data_found=found,
        images=order.num_images if order else None,
        images_per_epoch=order.images_per_epoch if order else None,
        steps_per_epoch=order.batches_per_epoch if order else None,
        state_bytes=parameters * 4 * 5,
        activation_bytes=_activation_bytes(config),
        loader_bytes=reading.bound if reading else 2 * config.data.loader_cache_bytes,
        loader_formula=reading.formula() if reading else "at most 2 x loader_cache_bytes (known once data is prepared)",
    )


def _activation_bytes(config: TrainConfig) -> int:
    """Counts what autograd saves in one forward pass, on the meta device: exact shapes, no memory, no arithmetic."""
    batch = -(-config.data.num_streams // config.cluster.min_workers) * (
        config.data.batch_size // config.data.num_streams
    )
    model = config.model
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        saved[memory._cdata] = memory.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet = build_unet(model)
        weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
        x = torch.empty(batch, model.image_channels, model.image_size, model.image_size)
        eps_hat = unet(x, torch.zeros(batch, dtype=torch.int64))
        total = sum(size for memory, size in saved.items() if memory not in weights)
        del eps_hat  # kept until here: freed storages would be counted once for several tensors
    return total
