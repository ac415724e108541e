"""Ray actors that make images and features. The chunk is the unit: whoever makes it, however often, it is the same."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from pipeline import cluster
from pipeline.config import ClusterConfig, ProtocolConfig, SamplingConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import read_images
from pipeline.errors import WorldError
from pipeline.evaluation.bound import BoundPlan, bound_of_chunk
from pipeline.evaluation.crew import Crew
from pipeline.evaluation.features import extractor_of
from pipeline.generation import generate_chunk
from pipeline.model_folder import (
    EMA_FILE,
    META_FILE,
    Meta,
    build_schedule,
    build_unet,
    load_tensors,
    read_meta,
    shown_as,
)

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["ModelFiles", "Workers", "open_workers"]

_FEATURE_BATCH = 32


@dataclass(frozen=True)
class ModelFiles:
    """A published model as bytes, so that it reaches actors on every node."""

    model_id: str
    weights: bytes
    meta: bytes

    @classmethod
    def read(cls, model_id: str, folder: Path) -> "ModelFiles":
        """Reads a model folder."""
        try:
            return cls(model_id, (folder / EMA_FILE).read_bytes(), (folder / META_FILE).read_bytes())
        except OSError as error:
            raise WorldError(f"{folder} is no published model: {error.strerror} {error.filename}") from error

    def read_meta(self, location: str) -> Meta:
        """What ``meta.json`` says. Raises ``WorldError`` if it is damaged or of another version; names ``location``."""
        with tempfile.TemporaryDirectory(prefix="ddpm-meta-") as folder, shown_as(Path(folder), location):
            (Path(folder) / META_FILE).write_bytes(self.meta)
            return read_meta(Path(folder))


class ChunkActor:
    """Generates chunks and computes features, on one CPU share or GPU."""

    def __init__(self, protocol: ProtocolConfig, threads: int, use_gpu: bool) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._extractor = extractor_of(protocol, self._device)
        self._loaded: tuple[str, Any, Any, Any] | None = None

    def ready(self) -> None:
        """Answers once the actor has started."""

    def features_of_chunk(
        self,
        model: "list[ObjectRef[ModelFiles]]",
        model_id: str,
        sampling: SamplingConfig,
        size: int,
        chunk: int,
        with_images: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Generates one chunk.

        Args:
            model: A list around the reference, since Ray would otherwise fetch the bytes for every chunk.
            model_id: Which model that is.
            sampling: Sampler and seed.
            size: Images of the chunk.
            chunk: Its index.
            with_images: Whether the images are wanted as well.

        Returns:
            Features, float32 [size, d], and images, uint8 [size, C, H, W].
        """
        unet, schedule, trained = self._model(model, model_id)
        shape = (size, trained.model.image_channels, trained.model.image_size, trained.model.image_size)
        images = generate_chunk(unet, schedule, sampling, trained=trained, shape=shape, chunk=chunk)
        return self._features(images), images if with_images else None

    def bound_of_chunk(
        self,
        model: "list[ObjectRef[ModelFiles]]",
        model_id: str,
        sampling: SamplingConfig,
        plan: BoundPlan,
        manifest: "list[ObjectRef[Manifest]]",
        chunk: int,
    ) -> Tensor:
        """Terms of the variational bound of a chunk of held-out images, float64 [n, 2 + runs of steps]."""
        unet, schedule, trained = self._model(model, model_id)
        held_out = ray.get(manifest[0])
        return bound_of_chunk(unet, schedule, sampling, plan, trained=trained, manifest=held_out, chunk=chunk)

    def features_of_shard(self, location: str, manifest: "list[ObjectRef[Manifest]]", shard: int) -> Tensor:
        """Features of a shard's images, float32 [n, d], in the shard's order."""
        return self._features(read_images(location, ray.get(manifest[0]), shard))

    def _model(self, model: "list[ObjectRef[ModelFiles]]", model_id: str) -> tuple[Any, Any, Any]:
        if self._loaded is None or self._loaded[0] != model_id:
            self._loaded = (model_id, *self._load(ray.get(model[0])))
        return self._loaded[1:]

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self._extractor(part).cpu() for part in torch.split(images, _FEATURE_BATCH)])

    def _load(self, files: ModelFiles) -> tuple[Any, Any, Any]:
        with tempfile.TemporaryDirectory(prefix="ddpm-model-") as name:
            folder = Path(name)
            (folder / EMA_FILE).write_bytes(files.weights)
            (folder / META_FILE).write_bytes(files.meta)
            meta = read_meta(folder)
            tensors = load_tensors(folder, EMA_FILE, meta)
        unet = build_unet(meta.config.model).eval()
        try:
            unet.load_state_dict(tensors)
        except RuntimeError as error:
            raise WorldError(
                f"the weights do not fit the network of {META_FILE}: {str(error).splitlines()[0]}"
            ) from error
        unet.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return unet, build_schedule(meta.config.diffusion).to(self._device), meta.config


class Workers:
    """Actors that give results in the order of the work, whichever actor is done first."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    def chunks(
        self,
        files: ModelFiles,
        sampling: SamplingConfig,
        *,
        numbers: range,
        size: int,
        with_images: Collection[int] = (),
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Number, features and, of the chunks that are named, images of chunks, in the order of ``numbers``."""
        model = [ray.put(files)]
        found = self._crew.results(
            lambda actor, chunk: actor.features_of_chunk.remote(
                model, files.model_id, sampling, size, chunk, chunk in with_images
            ),
            numbers,
        )
        for chunk, (features, images) in zip(numbers, found, strict=True):
            yield chunk, features, images

    def bounds(
        self, files: ModelFiles, sampling: SamplingConfig, plan: BoundPlan, manifest: Manifest, numbers: range
    ) -> Iterator[Tensor]:
        """Terms of the variational bound of chunks of held-out images, in the order of ``numbers``."""
        model, held_out = [ray.put(files)], [ray.put(manifest)]
        return self._crew.results(
            lambda actor, chunk: actor.bound_of_chunk.remote(model, files.model_id, sampling, plan, held_out, chunk),
            numbers,
        )

    def shards(self, location: str, manifest: Manifest) -> Iterator[Tensor]:
        """Features of a data set's images, shard by shard."""
        reference = [ray.put(manifest)]
        return self._crew.results(
            lambda actor, shard: actor.features_of_shard.remote(location, reference, shard),
            range(len(manifest.shards)),
        )


@contextmanager
def open_workers(config: ClusterConfig, protocol: ProtocolConfig, *, most: int) -> Iterator[Workers]:
    """Starts the actors and ends them afterwards.

    All are asked for, so that a cluster that can grow does; work begins with the first that has a place.

    Args:
        config: How many, and their size.
        protocol: The feature network.
        most: No more actors than this have work.
    """
    cluster.require(num_workers=1, cpus_per_worker=config.cpus_per_worker, use_gpu=config.use_gpu)
    actor = ray.remote(ChunkActor).options(
        num_cpus=config.cpus_per_worker,
        num_gpus=1 if config.use_gpu else 0,
        # Within a trial of a sweep: beside the trial's own share of the cluster, which holds no CPU.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )
    crew = Crew(
        lambda: actor.remote(protocol, config.cpus_per_worker, config.use_gpu),
        size=min(config.max_workers, most),
        max_losses=config.max_failures,
    )
    try:
        yield Workers(crew)
    finally:
        crew.close()
