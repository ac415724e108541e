"""One measurement in a Ray task: the sample sheet of a checkpoint and, if asked for, a rough distance.

The module imports nothing heavy: on a CPU the task lowers its priority before it loads torch, since that alone would
cost the workers seconds.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from ray import ObjectRef
    from torch import Tensor

    from pipeline.data.manifest import Manifest

__all__ = ["Job", "Measure", "Measured", "chunk_sizes", "measure", "run"]

_CHUNK = 64


class Measure(Protocol):
    """What says how far images are from a data set. Training may not know ``evaluation``: its caller hands this in."""

    @property
    def metric(self) -> str:
        """The name under which the distance is logged."""
        ...

    @property
    def num_images(self) -> int:
        """Images that it is measured on."""
        ...

    def distance(
        self, images: "Iterable[Tensor]", location: str, manifest: "Manifest", device: "torch.device"
    ) -> float:
        """The distance of images, uint8 [B, C, H, W] each, from all images of a data set."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a measurement needs, by value: it may run on another machine."""

    step: int
    weights: bytes
    meta: bytes
    grid_images: int
    location: str
    manifest: "Manifest"
    measure: Measure | None
    use_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a measurement gives."""

    step: int
    sheet: "np.ndarray"
    """Sample sheet, uint8 [C, H, W]."""
    distance: float | None
    problem: str | None
    """Why there is no distance though one was asked for."""


def measure(job: "list[ObjectRef[Job]]") -> Measured:
    """The Ray task.

    Args:
        job: A list around the reference, so that Ray does not unpickle it, and so load torch, before the task begins.

    Raises:
        WorldError: The files are damaged, or the network returned values that are not finite.
    """
    import ray

    if not ray.get_gpu_ids():
        # Not SCHED_IDLE: the last measurement of a run would starve beside other runs, and the run waits for it.
        os.nice(19)
    return run(ray.get(job[0]))


def run(job: Job) -> Measured:
    """Makes the sheet and measures the distance; without Ray. Raises as ``measure``."""
    import torch

    from pipeline.images import image_grid

    device = torch.device("cuda" if job.use_gpu else "cpu")
    if not job.use_gpu:
        torch.set_num_threads(1)
    chunks = _chunks(job, device)
    first = next(chunks)
    distance = problem = None
    if job.measure is not None:
        try:
            distance = job.measure.distance(_with_first(first, chunks), job.location, job.manifest, device)
        except Exception as error:  # The sheet is there: it must not be lost with the distance.
            problem = f"{type(error).__name__}: {error}"
    sheet = image_grid(first).numpy()
    return Measured(step=job.step, sheet=sheet, distance=distance, problem=problem)


def chunk_sizes(grid_images: int, num_images: int) -> list[int]:
    """Sizes of the chunks that are generated: the sheet is the first of them and counts for the distance as well."""
    sizes = [grid_images]
    while (missing := num_images - sum(sizes)) > 0:
        sizes.append(min(missing, _CHUNK))
    return sizes


def _with_first(first: "Tensor", rest: "Iterator[Tensor]") -> "Iterator[Tensor]":
    yield first
    yield from rest


def _chunks(job: Job, device: "torch.device") -> "Iterator[Tensor]":
    import tempfile
    from pathlib import Path

    import torch

    from pipeline.generation import generate_chunk
    from pipeline.model_folder import EMA_FILE, META_FILE, build_schedule, build_unet, load_tensors, read_meta

    with tempfile.TemporaryDirectory(prefix="ddpm-quality-") as name:
        folder = Path(name)
        (folder / EMA_FILE).write_bytes(job.weights)
        (folder / META_FILE).write_bytes(job.meta)
        meta = read_meta(folder)
        tensors = load_tensors(folder, EMA_FILE, meta)
    model = meta.config.model
    unet = build_unet(model).eval()
    unet.load_state_dict(tensors)
    unet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule = build_schedule(meta.config.diffusion).to(device)
    sizes = chunk_sizes(job.grid_images, job.measure.num_images if job.measure else 0)
    for chunk, size in enumerate(sizes):
        shape = (size, model.image_channels, model.image_size, model.image_size)
        yield generate_chunk(unet, schedule, meta.config.sampling, trained=meta.config, shape=shape, chunk=chunk)
