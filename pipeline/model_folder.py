"""A model as files: safetensors weights plus ``meta.json`` that a person can read.

The same layout serves the published model (the averages of the weights alone) and, with more files, the resumable
checkpoint. The architecture, T and the schedule of a model come from its ``meta.json``, never from flags. Every file's
sha256 is in ``meta.json``; nothing is unpickled.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline import draws, storage
from pipeline.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig, from_flat, to_flat
from pipeline.diffusion.averages import EMA, power_stem
from pipeline.diffusion.noise_schedule import NoiseSchedule, make_schedule
from pipeline.diffusion.unet import UNet
from pipeline.errors import UserError, WorldError

__all__ = [
    "EMA_FILE",
    "META_FILE",
    "MODEL_FILE",
    "Meta",
    "average_file",
    "average_files",
    "build_schedule",
    "build_unet",
    "encode_meta",
    "encode_tensors",
    "fetch_model",
    "load_tensors",
    "read_meta",
    "shown_as",
    "verified_bytes",
    "write_meta",
    "write_tensors",
]

FORMAT_VERSION = 1
META_FILE = "meta.json"
MODEL_FILE = "model.safetensors"
"""The raw weights, in resumable checkpoints only."""
Tensors = dict[str, Tensor]


def average_file(stem: str) -> str:
    """File name of an average of the weights, by the stem that ``Averages`` gives it."""
    return f"{stem}.safetensors"


EMA_FILE = average_file(EMA)


def average_files(config: OptimizerConfig) -> list[str]:
    """Files of all averages that a run keeps: the EMA, then the power-function averages in the order of the config."""
    return list(dict.fromkeys([EMA_FILE, *(average_file(power_stem(sigma_rel)) for sigma_rel in config.ema_power)]))


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What ``meta.json`` says."""

    step: int
    """Optimizer steps done."""
    config: TrainConfig
    """The training run's config."""
    data: Mapping[str, Any]
    """The data set: location, digest, number of images, class names."""
    code: Mapping[str, str]
    """Versions of the code and the libraries that wrote it."""
    files: Mapping[str, str]
    """sha256 by file name."""


def build_unet(config: ModelConfig, *, seed: int = 0) -> UNet:
    """The network, with initial weights that are a function of the seed alone."""
    return UNet(
        image_size=config.image_size,
        in_channels=config.image_channels,
        base_channels=config.base_channels,
        channel_mult=config.channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=config.attention_resolutions,
        dropout=config.dropout,
        num_classes=config.num_classes,
        generator=torch.Generator("cpu").manual_seed(draws.torch_seed(seed, draws.Purpose.INIT)),
    )


def build_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule. Raises ``UserError`` for one that breaks betas or leaves signal in x_T."""
    return make_schedule(**to_flat(config))


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the content of a safetensors file."""
    return safetensors.torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file."""
    (folder / name).write_bytes(encode_tensors(tensors))


def write_meta(
    folder: Path, *, step: int, config: TrainConfig, data: Mapping[str, Any], code: Mapping[str, str]
) -> Meta:
    """Writes ``meta.json`` over all files that are in the folder, last."""
    names = sorted(path.name for path in folder.iterdir() if path.name != META_FILE)
    files = {name: storage.sha256_hex((folder / name).read_bytes()) for name in names}
    meta = Meta(step=step, config=config, data=data, code=code, files=files)
    (folder / META_FILE).write_bytes(encode_meta(step=step, config=config, data=data, code=code, files=files))
    return meta


def encode_meta(
    *,
    step: int,
    config: TrainConfig,
    data: Mapping[str, Any],
    code: Mapping[str, str],
    files: Mapping[str, str],
) -> bytes:
    """The content of ``meta.json``; the fields are those of ``Meta``."""
    record = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "config": to_flat(config),
        "data": dict(data),
        "code": dict(code),
        "files": dict(files),
    }
    return (json.dumps(record, indent=2) + "\n").encode()


def read_meta(folder: Path) -> Meta:
    """Reads ``meta.json``.

    Raises:
        WorldError: It is missing, damaged, or of a version that this code does not know.
    """
    try:
        record = json.loads((folder / META_FILE).read_text())
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise WorldError(f"{folder}: checkpoint format {version}; this version reads {FORMAT_VERSION}")
        return Meta(
            step=int(record["step"]),
            config=from_flat(TrainConfig, record["config"]),
            data=dict(record["data"]),
            code=dict(record["code"]),
            files=dict(record["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise WorldError(f"{folder}/{META_FILE} was written by other code: {error}") from error
        raise WorldError(f"{folder}/{META_FILE} is missing or damaged: {error!r}") from error


def verified_bytes(folder: Path, name: str, meta: Meta) -> bytes:
    """A file's bytes, after comparing them with the sha256 in ``meta.json``.

    Raises:
        WorldError: The file is missing, truncated or changed.
    """
    expected = meta.files.get(name)
    if expected is None:
        raise WorldError(f"{folder} has no {name} (it holds {', '.join(sorted(meta.files))})")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise WorldError(f"{folder / name} cannot be read: {error.strerror}") from error
    found = storage.sha256_hex(data)
    if found != expected:
        raise WorldError(f"{folder / name} is damaged: {len(data)} bytes, sha256 {found}, expected {expected}")
    return data


def load_tensors(folder: Path, name: str, meta: Meta) -> Tensors:
    """Reads one safetensors file, verified. Raises as ``verified_bytes``."""
    try:
        return safetensors.torch.load(verified_bytes(folder, name, meta))
    except safetensors.SafetensorError as error:
        raise WorldError(f"{folder / name} is no safetensors file: {error}") from error


def fetch_model(location: str, folder: Path, *, patience_seconds: float = 0.0) -> tuple[Meta, Tensors]:
    """Reads a published model from storage, verified.

    Args:
        location: The model folder: a path or an ``s3://`` URI.
        folder: An empty local folder for its files.
        patience_seconds: How long to wait for S3 that is unreachable.

    Returns:
        What its ``meta.json`` says, and the EMA.

    Raises:
        FileNotFoundError: No model lies there.
        WorldError: It is damaged, or storage does not answer.
    """
    for name in (META_FILE, EMA_FILE):
        data = storage.read_bytes(storage.join(location, name), patience_seconds=patience_seconds)
        (folder / name).write_bytes(data)
    with shown_as(folder, location):
        meta = read_meta(folder)
        return meta, load_tensors(folder, EMA_FILE, meta)


@contextlib.contextmanager
def shown_as(folder: Path, location: str) -> Iterator[None]:
    """Errors of a temporary copy name the place that it was copied from, which a reader can find."""
    try:
        yield
    except WorldError as error:
        raise WorldError(str(error).replace(str(folder), location)) from error
