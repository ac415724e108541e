"""A folder of diffusers' ``DDPMPipeline``, without diffusers: two configs in JSON and a safetensors file.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json

Older folders, such as google/ddpm-cifar10-32, have all files at the top, and older names of attention's layers.
A folder of ``UNet2DModel.save_pretrained`` alone has no scheduler.
"""

import json
import re
from dataclasses import replace
from typing import Any

import safetensors.torch

from pipeline import storage
from pipeline.config import RecipeConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.interop.diffusers_scheduler import our_schedule, their_scheduler
from pipeline.interop.diffusers_unet import our_model, their_unet
from pipeline.interop.foreign_files import Tensors, read_object, read_tensors
from pipeline.interop.names import diffusers_name, our_tensors, their_tensors
from pipeline.interop.recipe import Imported, complete

__all__ = ["FILES", "INDEX_FILE", "read_folder", "write_folder"]

INDEX_FILE = "model_index.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FILES = ("unet/config.json", f"unet/{_WEIGHTS[0]}", "scheduler/scheduler_config.json", INDEX_FILE)
"""What an export consists of, in the order of writing."""
_OLDER = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_NOTHING = RecipeConfig()
_LINEAR = r"attentions\.\d+\.to_"


def read_folder(location: str, *, image_size: int | None = None, given: RecipeConfig = _NOTHING) -> Imported:
    """Reads a network and its schedule.

    Args:
        location: The folder: a path or an ``s3://`` URI.
        image_size: Height and width where the config names none, pixels.
        given: What is known of schedule and sampling beside the folder.

    Raises:
        UserError: A file is missing or damaged, or the network is not ours.
    """
    unet = _part(location, "unet", "config.json")
    model = our_model(read_object(unet), where=unet, image_size=image_size)
    scheduler = _scheduler(location)
    told = our_schedule(read_object(scheduler), where=scheduler) if scheduler else {}
    made = complete(told, given, replace(TrainConfig(), model=model), scheduler or location)
    weights = _weights(unet)
    tensors = our_tensors(_newer(read_tensors(weights)), model, diffusers_name, where=weights)
    name = weights.rpartition("/")[2]
    notes = () if name in _WEIGHTS else (f"read {name}, the only weights there",)
    return replace(made, tensors=tensors, notes=made.notes + notes)


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
    contents = (
        _encoded(their_unet(config.model)),
        safetensors.torch.save(weights, metadata={"format": "pt"}),
        _encoded(their_scheduler(config)),
        _encoded(index),
    )
    for name, data in zip(FILES, contents, strict=True):
        storage.write_bytes(storage.join(location, name), data)


def _part(location: str, part: str, name: str) -> str:
    """Where a config is: in its own folder, or at the top."""
    places = [storage.join(location, part, name), storage.join(location, name)]
    for place in places:
        if storage.exists(place):
            return place
    raise UserError(f"{location} has no {part}/{name}; give a folder that DDPMPipeline.save_pretrained wrote")


def _scheduler(location: str) -> str | None:
    """None in a folder of a network alone."""
    try:
        return _part(location, "scheduler", "scheduler_config.json")
    except UserError:
        if storage.exists(storage.join(location, INDEX_FILE)):
            raise  # a pipeline whose scheduler got lost
        return None


def _weights(unet: str) -> str:
    """The usual file, else that of the one variant there is (``variant="fp16"``)."""
    folder = unet.rpartition("/")[0]
    for name in _WEIGHTS:
        if storage.exists(storage.join(folder, name)):
            return storage.join(folder, name)
    names = [location.rpartition("/")[2] for location in storage.list_files(folder)]
    found = sorted({name for name in names if re.match(r"diffusion_pytorch_model.*\.(safetensors|bin)$", name)})
    if not found:
        raise UserError(f"{folder} has no {_WEIGHTS[0]} and no {_WEIGHTS[1]}; give a folder that save_pretrained wrote")
    if any("-of-" in name for name in found):
        how = "save it in one file: save_pretrained(FOLDER, max_shard_size='100GB')"
        raise UserError(f"{folder} has its weights in several files ({', '.join(found[:3])}); {how}")
    if len({name.rpartition(".")[0] for name in found}) > 1:
        raise UserError(f"{folder} has several variants ({', '.join(found)}); rename the one you want {_WEIGHTS[0]}")
    return storage.join(folder, found[-1])


def _newer(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _OLDER:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _encoded(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()
