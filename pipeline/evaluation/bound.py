"""Bits per dimension of a data set that the model has not seen: the variational bound, gathered over its images.

The numbers of an image are a function of (sample seed, place of the image in the data set): any number of workers, any
order, any retry give the same bits. A killed evaluation goes on with the chunks that are missing.
"""

import csv
import io
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import draws
from pipeline.config import EvaluateConfig, SamplingConfig, TrainConfig
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.shards import read_chosen
from pipeline.diffusion.denoisers import Network, eps_denoiser, guided
from pipeline.diffusion.likelihood import bound_term, prior_term, stratified_timesteps
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.statistics import FeatureStatistics
from pipeline.generation import limit_of
from pipeline.images import to_model_range
from pipeline.storage import resolve

__all__ = ["BOUND_NAMES", "BoundPlan", "Likelihood", "bound_of_chunk", "bound_protocol", "held_out_set"]

BOUND_NAMES = ("bpd", "bpd_stderr", "bpd_prior", "bpd_decoder", "bpd_steps")
"""Under which ``Likelihood.values`` are logged."""

_CHUNK = 50
"""Images evaluated together; part of the protocol, since it changes the last bits."""


@dataclass(frozen=True, kw_only=True)
class BoundPlan:
    """Which images, and how many terms of each."""

    location: str
    """The held-out data set."""
    num_images: int
    """Drawn at random from it, always the same ones; at most all of them."""
    stride: int
    """One step is evaluated of each run of so many; 1 takes all T."""

    @classmethod
    def of(cls, config: EvaluateConfig, manifest: Manifest) -> "BoundPlan":
        """What the knobs ask for."""
        assert config.held_out is not None
        return cls(
            location=resolve(config.held_out, "data"),
            num_images=min(config.bound_images, manifest.num_images),
            stride=config.bound_stride,
        )

    @property
    def num_chunks(self) -> int:
        """Pieces of work."""
        return math.ceil(self.num_images / _CHUNK)

    def num_columns(self, T: int) -> int:
        """Numbers for each image: the prior, the decoder, and a term for each run of steps."""
        return 2 + math.ceil((T - 1) / self.stride)

    def places(self, manifest: Manifest, chunk: int) -> np.ndarray:
        """Places in the data set of a chunk's images, ascending, int64 [n]."""
        chosen = draws.permutation(manifest.num_images, 0, draws.Purpose.BOUND_IMAGE)[: self.num_images]
        return np.sort(chosen[chunk * _CHUNK : (chunk + 1) * _CHUNK])


def held_out_set(config: EvaluateConfig) -> Manifest:
    """The data set of ``--held-out``. Raises ``UserError`` if there is none."""
    assert config.held_out is not None
    return load_manifest(resolve(config.held_out, "data"))


def bound_protocol(config: EvaluateConfig, of_distance: Protocol, suffix: str) -> Protocol:
    """The protocol of bits per dimension: nothing of features or generated images is in it.

    Args:
        config: Held-out data set, number of images and stride.
        of_distance: The protocol of the Frechet distance, for weights, device, threads and seed.
        suffix: Of the metric, which names the weights.
    """
    manifest = held_out_set(config)
    plan = BoundPlan.of(config, manifest)
    which = "every step" if plan.stride == 1 else f"one step of each {plan.stride}"
    return replace(
        of_distance,
        metric=BOUND_NAMES[0] + suffix,
        features="none",
        features_sha256="",
        resize="none",
        rounding="none",
        reference_digest=manifest.digest,
        num_images=plan.num_images,
        chunk_size=_CHUNK,
        sampler=f"bound({config.sampling.variance})",
        sampling_steps=0,
        guidance=1.0,
        timestep_spacing="uniform",
        settings=f"variational bound, {which}, images drawn at random",
    )


@torch.inference_mode()
def bound_of_chunk(
    unet: nn.Module,
    schedule: NoiseSchedule,
    sampling: SamplingConfig,
    plan: BoundPlan,
    *,
    trained: TrainConfig,
    manifest: Manifest,
    chunk: int,
) -> Tensor:
    """The bound's terms of the images of a chunk.

    Args:
        unet: The network, in evaluation mode.
        schedule: Of its training, on its device.
        sampling: Variance of the reverse step, clipping of x_0 and seed.
        plan: Which images and steps.
        trained: The config of the network's training.
        manifest: Of the held-out data set.
        chunk: Index, in [0, plan.num_chunks).

    Returns:
        Bits per dimension, float64 [n, 2 + runs of steps]: prior, decoder, and the weighted terms; an image's bound is
        the sum of its row.

    Raises:
        UserError: The network knows classes and an image has none.
        WorldError: Images are missing or damaged, or the network returned values that are not finite.
    """
    device = schedule.betas.device
    places = plan.places(manifest, chunk)
    images, labels = read_chosen(plan.location, manifest, places.tolist())
    x_0 = to_model_range(images).to(device).contiguous(memory_format=torch.channels_last)
    network = _told_classes(unet, labels.to(device), trained, plan.location)
    denoise = eps_denoiser(network, schedule, trained.model.prediction)
    T, seed = trained.diffusion.T, sampling.sample_seed
    runs = plan.num_columns(T) - 2
    uniform = [draws.uniform(runs, seed, draws.Purpose.BOUND_TIMESTEP, int(place)) for place in places]
    steps, weights = stratified_timesteps(torch.stack(uniform), T, plan.stride)
    columns = [prior_term(schedule, x_0).cpu()]
    for column, (t, weight) in enumerate(zip(steps.T, weights.tolist(), strict=True)):
        eps = torch.stack(
            [
                draws.standard_normal(x_0.shape[1:], seed, draws.Purpose.BOUND_NOISE, int(place), column)
                for place in places
            ]
        )
        term = bound_term(
            denoise,
            schedule,
            x_0,
            t.to(device),
            eps.to(device).contiguous(memory_format=torch.channels_last),
            variance=sampling.variance,
            limit_x_0=limit_of(sampling),
        )
        columns.append(weight * term.cpu())
    found = torch.stack(columns, dim=1)
    if not bool(torch.isfinite(found).all()):
        raise WorldError(f"the network returned values that are not finite (chunk {chunk}); the weights are broken")
    return found


def _told_classes(unet: nn.Module, labels: Tensor, trained: TrainConfig, location: str) -> Network:
    num_classes = trained.model.num_classes
    if num_classes == 0:
        return unet
    if bool((labels < 0).any()) or bool((labels >= num_classes).any()):
        raise UserError(f"--held-out {location}: the model knows {num_classes} classes, some images have none")
    return guided(unet, labels, num_classes=num_classes)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The bound over all images."""

    statistics: FeatureStatistics
    """Of the rows of ``bound_of_chunk``."""
    T: int
    stride: int

    def values(self) -> tuple[float, ...]:
        """Bits per dimension: bound, its standard error over images, prior L_T, decoder L_0, and the steps between."""
        mean = self.statistics.mean
        error = 0.0
        if self.statistics.n > 1:
            error = math.sqrt(max(0.0, float(self.statistics.covariance.sum())) / self.statistics.n)
        return float(mean.sum()), error, float(mean[0]), float(mean[1]), float(mean[2:].sum())

    def to_csv(self) -> str:
        """A line for each run of steps: its first and last t, 0-based (the paper's is one more), and its bits."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["term", "first_t", "last_t", "bits_per_dimension"])
        mean = self.statistics.mean.tolist()
        writer.writerow(["prior", self.T, self.T, f"{mean[0]:.9g}"])
        writer.writerow(["decoder", 0, 0, f"{mean[1]:.9g}"])
        for first, value in zip(range(1, self.T, self.stride), mean[2:], strict=True):
            writer.writerow(["step", first, min(first + self.stride, self.T) - 1, f"{value:.9g}"])
        return buffer.getvalue()
