"""A folder of diffusers' ``DDPMPipeline``, without diffusers: two configs in JSON and a safetensors file.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json

Older folders, such as google/ddpm-cifar10-32, have all files at the top, and older names of attention's layers.
"""

import json
import re
from dataclasses import replace
from typing import Any

import safetensors.torch

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.interop.diffusers_scheduler import our_schedule, their_scheduler
from pipeline.interop.diffusers_unet import our_model, their_unet
from pipeline.interop.foreign_files import Tensors, read_object, read_tensors
from pipeline.interop.names import diffusers_name, our_tensors, their_tensors

__all__ = ["INDEX_FILE", "read_folder", "write_folder"]

INDEX_FILE = "model_index.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_OLDER = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_LINEAR = r"attentions\.\d+\.to_"


def read_folder(location: str, *, image_size: int | None = None) -> tuple[TrainConfig, Tensors]:
    """Reads a network and its schedule.

    Args:
        location: The folder: a path or an ``s3://`` URI.
        image_size: Height and width where the config names none, pixels.

    Returns:
        A config whose model, schedule and sampling are the folder's (all other knobs are defaults), and the weights by
        our names.

    Raises:
        UserError: A file is missing or damaged, or the network is not ours.
    """
    unet, scheduler = (_part(location, part, name) for part, name in _PARTS)
    model = our_model(read_object(unet), where=unet, image_size=image_size)
    schedule, prediction, sampling = our_schedule(read_object(scheduler), where=scheduler)
    weights = _weights(unet)
    tensors = our_tensors(_newer(read_tensors(weights)), model, diffusers_name, where=weights)
    model = replace(model, prediction=prediction)  # type: ignore[arg-type]  # one of the words
    return replace(TrainConfig(), model=model, diffusion=schedule, sampling=sampling), tensors


def write_folder(location: str, config: TrainConfig, tensors: Tensors) -> None:
    """Writes the folder, ``model_index.json`` last.

    Raises:
        UserError: A ``UNet2DModel`` cannot be this network.
        WorldError: Storage refused.
    """
    weights = their_tensors(tensors, diffusers_name, linear=_LINEAR)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    files = {
        "unet/config.json": _encoded(their_unet(config.model)),
        f"unet/{_WEIGHTS[0]}": safetensors.torch.save(weights, metadata={"format": "pt"}),
        "scheduler/scheduler_config.json": _encoded(their_scheduler(config)),
        INDEX_FILE: _encoded(index),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(location, name), data)


_PARTS = (("unet", "config.json"), ("scheduler", "scheduler_config.json"))


def _part(location: str, part: str, name: str) -> str:
    """Where a config is: in its own folder, or at the top."""
    places = [storage.join(location, part, name), storage.join(location, name)]
    for place in places:
        if storage.exists(place):
            return place
    raise UserError(f"{location} has no {part}/{name}; give a folder that DDPMPipeline.save_pretrained wrote")


def _weights(unet: str) -> str:
    folder = unet.rpartition("/")[0]
    for name in _WEIGHTS:
        if storage.exists(storage.join(folder, name)):
            return storage.join(folder, name)
    raise UserError(f"{folder} has no {_WEIGHTS[0]} (weights in several files are not read); save it in one file")


def _newer(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _OLDER:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _encoded(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()
