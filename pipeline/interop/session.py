"""The convert job: a model of others becomes a model folder, or a model folder becomes one of diffusers."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import ConvertConfig, RecipeConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.interop.diffusers_folder import FILES, INDEX_FILE, read_folder, write_folder
from pipeline.interop.foreign_files import Tensors
from pipeline.interop.recipe import Imported
from pipeline.interop.state_dicts import read_state_dict
from pipeline.model_folder import EMA_FILE, META_FILE, encode_meta, encode_tensors, fetch_model
from pipeline.provenance import code_record

__all__ = ["Converted", "convert"]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What the job made."""

    location: str
    kind: str
    """What lies there."""
    parameters: int
    step: int
    image_size: int
    T: int
    schedule: str
    next: str
    """What can be done with it."""
    notes: tuple[str, ...] = ()
    """What was chosen or assumed in reading it."""

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        facts = f"{self.parameters:,} parameters, {self.image_size}x{self.image_size}, {self.schedule}, T={self.T}"
        return "\n".join([f"{self.location} is {self.kind}: {facts}, step {self.step:,}", *self.notes, self.next])


def convert(config: ConvertConfig) -> Converted:
    """Converts what ``config`` names.

    Raises:
        UserError: The source is no such model, or is another network; the destination is taken.
        WorldError: A model folder is damaged, or storage refused.
    """
    kind, _, path = config.source.partition(":")
    destination = storage.resolve(config.destination)
    _check_destination(destination)
    if kind == "model":
        return _export(config, storage.resolve(path), destination)
    source = path if storage.is_remote(path) else str(Path(path).expanduser().absolute())
    imported = _READERS[kind](source, image_size=config.image_size, given=config.recipe)
    return _import(config, source, destination, imported)


def _check_destination(destination: str) -> None:
    """A folder that is empty, missing, or left by this command before its last file."""
    found = {location.removeprefix(storage.join(destination, "")) for location in storage.list_files(destination)}
    for name in (META_FILE, INDEX_FILE):
        if name in found:
            raise UserError(f"--destination {destination} holds a model ({name}); choose another place or delete it")
    if foreign := sorted(found - {EMA_FILE, *FILES}):
        raise UserError(f"--destination {destination} holds other files ({foreign[0]}); give a new or an empty folder")
    if not storage.is_remote(destination) and Path(destination).is_file():
        raise UserError(f"--destination {destination} is a file; give a new or an empty folder")


_READERS: dict[str, Callable[..., Imported]] = {
    "diffusers": read_folder,
    "state-dict": read_state_dict,
}


def _import(config: ConvertConfig, source: str, destination: str, imported: Imported) -> Converted:
    weights = encode_tensors(imported.tensors)
    storage.write_bytes(storage.join(destination, EMA_FILE), weights)
    meta = encode_meta(
        step=config.step,
        config=imported.config,
        data={"location": f"unknown: imported from {source}", "digest": "", "num_images": 0, "class_names": []},
        code=code_record(),
        files={EMA_FILE: storage.sha256_hex(weights)},
    )
    storage.write_bytes(storage.join(destination, META_FILE), meta)
    evaluate = f"python jobs/evaluate.py --checkpoint {destination} --reference DATA"
    train = f"python jobs/train.py --init-from {destination} ..."
    next_ = f"measure it: {evaluate}\ntrain on: {train}"
    made = _converted(destination, "a model", config.step, imported.config, imported.tensors, next_)
    return replace(made, notes=imported.notes)


def _export(config: ConvertConfig, source: str, destination: str) -> Converted:
    if config.image_size is not None or config.step or config.recipe != RecipeConfig():
        raise UserError(
            "--image-size, --step and what the paper would fill in belong to an import; a model knows its own"
        )
    with tempfile.TemporaryDirectory(prefix="ddpm-convert-") as folder:
        try:
            meta, tensors = fetch_model(source, Path(folder))
        except FileNotFoundError as error:
            wanted = f"a folder with {EMA_FILE} and {META_FILE}, as training publishes and keeps them"
            raise UserError(f"--source model:{source} is no model: give {wanted}") from error
    write_folder(destination, meta.config, tensors)
    use = f"use it: DDPMPipeline.from_pretrained({destination!r})(num_inference_steps={meta.config.diffusion.T})"
    return _converted(destination, "a folder of diffusers", meta.step, meta.config, tensors, use)


def _converted(location: str, kind: str, step: int, trained: TrainConfig, tensors: Tensors, next_: str) -> Converted:
    return Converted(
        location=location,
        kind=kind,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        step=step,
        image_size=trained.model.image_size,
        T=trained.diffusion.T,
        schedule=trained.diffusion.schedule,
        next=next_,
    )
