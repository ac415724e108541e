"""A published model as an ``mlflow.pyfunc`` model: images on any machine that has this package.

    model = mlflow.pyfunc.load_model("models:/ddpm@champion")
    images = model.predict({"num_images": 16, "sample_seed": 1})

The ``MLmodel`` file of a registered version names this module as its loader; nothing is unpickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import SamplingConfig, override, to_flat
from pipeline.errors import UserError
from pipeline.generation import check_sampling, generate_chunk
from pipeline.model_folder import EMA_FILE, build_schedule, build_unet, load_tensors, read_meta

__all__ = ["ImageModel"]

_CHUNK = 64


class ImageModel:
    """Makes images; what MLflow calls a python function."""

    def __init__(self, folder: Path) -> None:
        """Loads a published model.

        Raises:
            WorldError: A file is missing, damaged or of another version.
        """
        meta = read_meta(folder)
        self._trained = meta.config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        unet = build_unet(meta.config.model).eval()
        unet.load_state_dict(load_tensors(folder, EMA_FILE, meta))
        self._unet = unet.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._schedule = build_schedule(meta.config.diffusion).to(self._device)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Generates images; the same request gives the same images.

        Args:
            model_input: How many; or a mapping with ``num_images`` and knobs of sampling (``sample_seed``,
                ``sampling_steps``, ...); or a table (pandas) with these as columns and one row.
            params: More of these knobs.

        Returns:
            Images, uint8 [num_images, H, W, C].

        Raises:
            UserError: An unknown knob, or a value that is not allowed.
        """
        knobs = {**_knobs(model_input), **(params or {})}
        num_images = int(knobs.pop("num_images", 1))
        if num_images < 1:
            raise UserError(f"num_images {num_images}: must be at least 1")
        sampling = override(self._trained.sampling, knobs)
        check_sampling(sampling, self._trained)
        model = self._trained.model
        parts = []
        for chunk, start in enumerate(range(0, num_images, _CHUNK)):
            shape = (min(_CHUNK, num_images - start), model.image_channels, model.image_size, model.image_size)
            parts.append(
                generate_chunk(self._unet, self._schedule, sampling, trained=self._trained, shape=shape, chunk=chunk)
            )
        images: np.ndarray = torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()
        return images


def _knobs(model_input: Any) -> dict[str, Any]:
    if isinstance(model_input, int):
        return {"num_images": model_input}
    if hasattr(model_input, "to_dict") and hasattr(model_input, "columns"):
        rows = model_input.to_dict("records")
        if len(rows) != 1:
            raise UserError(f"a table of {len(rows)} rows: give one, with num_images and sampling knobs as columns")
        model_input = rows[0]
    if not isinstance(model_input, Mapping):
        known = ", ".join(["num_images", *to_flat(SamplingConfig())])
        raise UserError(f"give a number of images, or a mapping of these: {known}; not {type(model_input).__name__}")
    return {str(key): value.item() if isinstance(value, np.generic) else value for key, value in model_input.items()}


def _load_pyfunc(path: str) -> ImageModel:
    """What MLflow calls to load a model."""
    return ImageModel(Path(path))
