"""Weights that a new run starts from, if they are not drawn: those of a model folder, its own or an imported one."""

import tempfile
from dataclasses import replace
from pathlib import Path

from torch import nn

from pipeline import storage
from pipeline.config import ModelConfig, TrainConfig, to_flat
from pipeline.errors import UserError
from pipeline.model_folder import EMA_FILE, META_FILE, fetch_model, read_meta, shown_as

__all__ = ["check_initial_weights", "load_initial_weights"]


def check_initial_weights(config: TrainConfig) -> None:
    """Looks whether ``init_from`` is a model that the config's network can start from; reads no weights.

    Raises:
        UserError: It is no model, or another network; the knobs that differ are named.
        WorldError: Its ``meta.json`` is damaged, or storage does not answer.
    """
    if config.init_from is None:
        return
    location = storage.resolve(config.init_from)
    with tempfile.TemporaryDirectory(prefix="ddpm-init-") as folder:
        try:
            if not storage.exists(storage.join(location, EMA_FILE)):
                raise FileNotFoundError(location)
            (Path(folder) / META_FILE).write_bytes(storage.read_bytes(storage.join(location, META_FILE)))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"--init-from {location} is no model: give a folder with {EMA_FILE} and {META_FILE}, as training and "
                "jobs/convert.py write them"
            ) from error
        with shown_as(Path(folder), location):
            found = read_meta(Path(folder)).config.model
    if changed := _differences(found, config.model):
        raise UserError(
            f"--init-from {location} is another network: {'; '.join(changed)}; give these flags as they were"
        )


def _differences(found: ModelConfig, wanted: ModelConfig) -> list[str]:
    there, here = to_flat(replace(found, dropout=0.0)), to_flat(replace(wanted, dropout=0.0))
    return [
        f"--{name.replace('_', '-')} was {there[name]}, now {here[name]}" for name in there if there[name] != here[name]
    ]


def load_initial_weights(unet: nn.Module, config: TrainConfig) -> None:
    """Puts the weights of ``init_from`` into a network; nothing without one.

    Raises:
        WorldError: The model is gone or damaged since it was checked.
    """
    if config.init_from is None:
        return
    location = storage.resolve(config.init_from)
    with tempfile.TemporaryDirectory(prefix="ddpm-init-") as folder:
        patience = config.data.storage_patience_seconds
        _, tensors = fetch_model(location, Path(folder), patience_seconds=patience)
    unet.load_state_dict(tensors)
