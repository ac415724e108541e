"""Ray actors that make images and features. The chunk is the unit: whoever makes it, however often, it is the same."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util import ActorPool
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from pipeline import cluster
from pipeline.config import ClusterConfig, ProtocolConfig, SamplingConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import read_images
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.features import load_extractor
from pipeline.generation import generate_chunk
from pipeline.model_folder import EMA_FILE, META_FILE, build_schedule, build_unet, load_tensors, read_meta

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


class ChunkActor:
    """Generates chunks and computes features, on one CPU share or GPU."""

    def __init__(self, protocol: ProtocolConfig, threads: int, use_gpu: bool) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._extractor = load_extractor(protocol.features, weights=protocol.inception_weights, device=self._device)
        self._loaded: tuple[str, Any, Any, Any] | None = None

    def features_of_chunk(
        self, model: "list[ObjectRef[ModelFiles]]", model_id: str, sampling: SamplingConfig, size: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        """Generates one chunk.

        Args:
            model: A list around the reference, since Ray would otherwise fetch the bytes for every chunk.
            model_id: Which model that is.
            sampling: Sampler and seed.
            size: Images of the chunk.
            chunk: Its index.

        Returns:
            Features, float32 [size, d], and images, uint8 [size, C, H, W].
        """
        if self._loaded is None or self._loaded[0] != model_id:
            self._loaded = (model_id, *self._load(ray.get(model[0])))
        _, unet, schedule, trained = self._loaded
        shape = (size, trained.model.image_channels, trained.model.image_size, trained.model.image_size)
        images = generate_chunk(unet, schedule, sampling, trained=trained, shape=shape, chunk=chunk)
        return self._features(images), images

    def features_of_shard(self, location: str, manifest: "list[ObjectRef[Manifest]]", shard: int) -> Tensor:
        """Features of a shard's images, float32 [n, d], in the shard's order."""
        return self._features(read_images(location, ray.get(manifest[0]), shard))

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
    """A pool of actors that gives results in the order of the work, whichever actor is done first."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def chunks(
        self, files: ModelFiles, sampling: SamplingConfig, *, num_chunks: int, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and images of chunks 0 .. num_chunks - 1, in this order."""
        model = [ray.put(files)]
        return self._map(
            lambda actor, chunk: actor.features_of_chunk.remote(model, files.model_id, sampling, size, chunk),
            range(num_chunks),
        )

    def shards(self, location: str, manifest: Manifest) -> Iterator[Tensor]:
        """Features of a data set's images, shard by shard."""
        reference = [ray.put(manifest)]
        return self._map(
            lambda actor, shard: actor.features_of_shard.remote(location, reference, shard),
            range(len(manifest.shards)),
        )

    def _map(self, submit: Callable[[Any, Any], Any], work: Iterable[Any]) -> Iterator[Any]:
        try:
            # A pool of its own for each piece of work: what an earlier one left unfinished must not come out here.
            yield from ActorPool(self._actors).map(submit, list(work))
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, UserError | WorldError) else WorldError(_last_line(error)) from error
        except RayError as error:
            raise WorldError(f"an evaluation worker was lost: {_last_line(error)}") from error


@contextmanager
def open_workers(config: ClusterConfig, protocol: ProtocolConfig, *, most: int) -> Iterator[Workers]:
    """Starts the actors and ends them afterwards.

    Args:
        config: How many, and their size; no more than fit the cluster as it is now.
        protocol: The feature network.
        most: No more actors than this have work.
    """
    cluster.require(num_workers=1, cpus_per_worker=config.cpus_per_worker, use_gpu=config.use_gpu)
    fitting = cluster.fits(num_workers=1, cpus_per_worker=config.cpus_per_worker, use_gpu=config.use_gpu)
    # None fits: an autoscaling cluster that is still empty. All are asked for, so that it grows.
    count = max(1, min(config.max_workers, most, fitting or config.max_workers))
    actor = ray.remote(ChunkActor).options(
        num_cpus=config.cpus_per_worker,
        num_gpus=1 if config.use_gpu else 0,
        max_restarts=config.max_failures,
        max_task_retries=config.max_failures,
        # Within a trial of a sweep: beside the trial's own share of the cluster, which holds no CPU.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )
    actors: list[Any] = [actor.remote(protocol, config.cpus_per_worker, config.use_gpu) for _ in range(count)]
    try:
        yield Workers(actors)
    finally:
        for handle in actors:
            ray.kill(handle)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else json.dumps(type(error).__name__)
