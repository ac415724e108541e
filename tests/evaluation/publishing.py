"""Published checkpoints for tests, without training: a small network with random weights."""

from pathlib import Path

import torch

from pipeline.config import PrepareConfig, TrainConfig, as_params, override, to_flat
from pipeline.data.manifest import load_manifest
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.diffusion.averages import EMA
from pipeline.model_folder import average_file, build_unet, write_meta, write_tensors
from pipeline.storage import home, resolve
from pipeline.tracking import Tracker


def prepare_digits() -> str:
    """The digits as a data set under the home; returns where it lies."""
    location = resolve("digits", "data")
    prepare(open_source("digits"), PrepareConfig(), location)
    return location


def write_model(
    folder: Path, *, name: str, step: int, seed: int, location: str, noise: float = 0.02, **knobs: object
) -> TrainConfig:
    """A model folder, as training publishes it."""
    changes = {"base_channels": 8, "name": name, "sampling_steps": 4, **knobs}
    config = override(TrainConfig(), changes)
    unet, generator = build_unet(config.model), torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    folder.mkdir(parents=True)
    write_tensors(folder, average_file(EMA), unet.state_dict())
    data = {"location": location, "digest": load_manifest(location).digest}
    write_meta(folder, step=step, config=config, data=data, code={})
    return config


def publish_run(tracker: Tracker, name: str, *steps: int, noise: float = 0.02, **knobs: object) -> str:
    """A finished run with a checkpoint at each step; returns its id."""
    location = resolve("digits", "data")
    digest = load_manifest(location).digest
    folders = [Path(home()) / "models" / f"{name}-{step}" for step in steps]
    configs = [
        write_model(folder, name=name, step=step, seed=step, location=location, noise=noise, **knobs)
        for folder, step in zip(folders, steps, strict=True)
    ]
    run = tracker.start_run(name, experiment="ddpm", params=as_params(to_flat(configs[0])), tags={})
    for folder, step in zip(folders, steps, strict=True):
        run.publish(folder, step, {"data.digest": digest, "data.location": location})
    run.finish("FINISHED")
    return run.run_id
