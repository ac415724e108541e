"""Do the numbers mean what people take them for? Real images, a real training, and images spoilt on purpose."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from publishing import prepare_digits
from runner import succeed
from torch import Tensor
from torch.nn import functional

from pipeline.data.manifest import load_manifest
from pipeline.data.shards import read_images
from pipeline.evaluation.features import load_extractor
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance

pytestmark = pytest.mark.slow

PROTOCOL = ["--num-images", "300", "--chunk-size", "100", "--sampling-steps", "10"]


@pytest.fixture(scope="module")
def halves() -> tuple[Tensor, Tensor]:
    """The handwritten digits, uint8 [n, 1, 8, 8], in two halves that share no image."""
    location = prepare_digits()
    manifest = load_manifest(location)
    images = torch.cat([read_images(location, manifest, shard) for shard in range(len(manifest.shards))])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[::2]], images[order[1::2]]


def blurred(strength: float) -> Callable[[Tensor], Tensor]:
    """A 3x3 kernel whose neighbours have this share of the centre's weight."""
    kernel = torch.full((1, 1, 3, 3), strength)
    kernel[..., 1, 1] = 1
    return lambda x: functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), kernel / kernel.sum())


def noised(std: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + 255 * std * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "spoil",
    [[blurred(0.1), blurred(0.3), blurred(1.0)], [noised(0.05), noised(0.15), noised(0.4)]],
    ids=["blurred", "noised"],
)
def test_spoilt_images_score_worse_in_the_order_of_the_damage(
    halves: tuple[Tensor, Tensor], spoil: list[Callable[[Tensor], Tensor]]
) -> None:
    extractor = load_extractor("efficientnet-lite0")

    def statistics(images: Tensor) -> FeatureStatistics:
        found = FeatureStatistics.empty(extractor.dim)
        for part in images.split(64):
            found.update(extractor(part))
        return found

    clean, reference = (half[:400] for half in halves)
    of_reference = statistics(reference)
    distances = [frechet_distance(statistics(clean), of_reference)]
    for damage in spoil:
        damaged = damage(clean.float()).round().clamp(0, 255).to(torch.uint8)
        distances.append(frechet_distance(statistics(damaged), of_reference))
    assert distances == sorted(distances), distances
    assert distances[-1] > 2 * distances[0], distances


@pytest.mark.usefixtures("one_cluster")
@pytest.mark.timeout(1200)
def test_the_distance_falls_over_training_and_the_average_of_the_weights_beats_the_last_ones() -> None:
    prepare_digits()
    words = ["--name", "trend", "--steps", "450", "--checkpoint-every", "150", "--log-every", "150"]
    # A rate that decays to nothing averages the weights by itself: the last ones are then as good as any average.
    words += ["--lr-decay", "constant"]
    succeed("train", *words, "--quality-images", "0")
    early, middle, late = sorted(evaluated("--run", "trend"), key=lambda evaluation: evaluation["step"])
    assert (early["step"], middle["step"], late["step"]) == (150, 300, 450)
    assert early["value"] > 1.1 * middle["value"] > 1.1**2 * late["value"], (early, middle, late)
    folder = Path(os.environ["DDPM_HOME"]) / "runs" / "trend" / "step-00000450"
    (raw,) = evaluated("--checkpoint", str(folder), "--reference", "digits", "--weights", "raw")
    assert raw["value"] > late["value"]
    assert (raw["metric"], raw["weights"]) == (f"{late['metric']}-raw", "raw")
    assert raw["identity"] != late["identity"]


def evaluated(*words: str) -> list[dict[str, Any]]:
    result: dict[str, Any] = succeed("evaluate", *words, *PROTOCOL)
    found: list[dict[str, Any]] = result["evaluated"]
    return found
