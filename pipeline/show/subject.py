"""What is shown: a model from a folder or from MLflow, and real images."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline import draws, storage
from pipeline.config import ShowConfig
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.shards import read_images
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.unet import UNet
from pipeline.errors import UserError
from pipeline.generation import check_sampling
from pipeline.model_folder import (
    EMA_FILE,
    META_FILE,
    Meta,
    build_schedule,
    build_unet,
    fetch_model,
    load_tensors,
    read_meta,
)
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["DataSet", "Model", "find_checkpoint", "load_data", "load_model"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with its averaged weights, ready to sample."""

    name: str
    """For titles and folders: run (of an imported model its folder) and step."""
    unet: UNet
    schedule: NoiseSchedule
    meta: Meta

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of its images."""
        config = self.meta.config.model
        return config.image_channels, config.image_size, config.image_size


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set of shards."""

    location: str
    manifest: Manifest

    def images(self, count: int, seed: int) -> Tensor:
        """Images of the first shard, drawn as a function of the seed; uint8 [count or fewer, C, H, W]."""
        found = read_images(self.location, self.manifest, 0)
        order = draws.permutation(len(found), seed, draws.Purpose.SHOW_IMAGE)[:count]
        return found[order.copy()]


def load_data(config: ShowConfig, model: Model | None) -> DataSet:
    """The data set that ``config`` names, else that of the model, else the digits.

    Raises:
        UserError: There is none, or its images are not of the model's shape.
    """
    if config.data is None and model is not None and not model.meta.data.get("digest"):
        raise UserError(
            f"--checkpoint {config.checkpoint} is an imported model, which names no training images: give --data for "
            "forward, interpolation and neighbours, or --pictures without them"
        )
    wanted = config.data or (str(model.meta.data["location"]) if model else "digits")
    location = storage.resolve(wanted, "data")
    manifest = load_manifest(location)
    height, width, channels = manifest.image_shape
    if model is not None and (channels, height, width) != model.shape:
        shape = "x".join(map(str, model.shape))
        raise UserError(f"--data {wanted} holds {channels}x{height}x{width} images, the model makes {shape}")
    return DataSet(location=location, manifest=manifest)


def load_model(config: ShowConfig, tracker: Tracker | None, checkpoint: Checkpoint | None) -> Model | None:
    """The model that ``config`` names; None if it names none.

    Raises:
        UserError: No model folder, or it cannot be sampled as ``config`` says.
        WorldError: Damaged files, or storage does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-show-") as name:
        if checkpoint is not None:
            assert tracker is not None
            folder = tracker.download(checkpoint, Path(name))
            meta = read_meta(folder)
            return _load(config, meta, load_tensors(folder, EMA_FILE, meta), "model")
        if config.checkpoint is None:
            return None
        location = storage.resolve(config.checkpoint)
        try:
            meta, tensors = fetch_model(location, Path(name))
        except (FileNotFoundError, NotADirectoryError) as error:
            wanted = f"a folder with {EMA_FILE} and {META_FILE}, as training publishes and keeps them"
            raise UserError(f"--checkpoint {location} is no model: give {wanted}") from error
        return _load(config, meta, tensors, location.rpartition("/")[2])


def find_checkpoint(config: ShowConfig, tracker: Tracker) -> Checkpoint:
    """The published checkpoint of ``config.run``: that of ``config.step``, else the last.

    Raises:
        UserError: No such run, or no such checkpoint.
    """
    assert config.run is not None
    run = tracker.find_run(config.run)
    if run is None:
        known = ", ".join(tracker.run_names()) or "none"
        raise UserError(f"no run is called {config.run!r} in {tracker.shown_uri}; known: {known}")
    found = {each.step: each for each in tracker.checkpoints(run.info.experiment_id, run_id=run.info.run_id)}
    if not found:
        raise UserError(f"run {config.run!r} has no published checkpoint yet")
    step = max(found) if config.step is None else config.step
    if step not in found:
        raise UserError(f"no checkpoint of step {step}; there are {_listed(sorted(found))}")
    return found[step]


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _load(config: ShowConfig, meta: Meta, tensors: Mapping[str, Tensor], folder: str) -> Model:
    check_sampling(config.sampling, meta.config)
    device = torch.device("cuda" if config.use_gpu else "cpu")
    unet = build_unet(meta.config.model)
    unet.load_state_dict(tensors)
    unet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(
        name=f"{meta.config.name or folder}-step-{meta.step}",
        unet=unet.eval(),
        schedule=build_schedule(meta.config.diffusion).to(device),
        meta=meta,
    )
