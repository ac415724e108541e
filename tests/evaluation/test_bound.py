"""Bits per dimension over a data set, against Gaussian grey levels whose bound is known."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from publishing import prepare_digits
from torch import Tensor, nn

from pipeline import storage
from pipeline.config import EvaluateConfig, PrepareConfig, SamplingConfig, TrainConfig, override
from pipeline.data.faults import DataError
from pipeline.data.manifest import Manifest, load_manifest, shard_location
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_chosen, read_images, read_index
from pipeline.data.sources import open_source
from pipeline.diffusion.likelihood import prior_term
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.errors import UserError
from pipeline.evaluation.bound import BoundPlan, Likelihood, bound_of_chunk
from pipeline.evaluation.statistics import FeatureStatistics
from pipeline.images import to_model_range
from pipeline.model_folder import build_schedule

STD = 0.25
TRAINED = override(TrainConfig(), {"T": 50, "image_size": 8, "image_channels": 1, "num_classes": 0})
UNCLIPPED = SamplingConfig(x0_clipping="none", variance="fixed-small")


class Optimal(nn.Module):
    """E[eps | x_t] for data N(0, STD^2)."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self._schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self._schedule.alphas_cumprod[t][:, None, None, None]
        return ((1 - alpha_bar).sqrt() / (alpha_bar * STD**2 + 1 - alpha_bar) * x_t).float()


@pytest.fixture
def gaussian(tmp_path: Path) -> tuple[str, Manifest]:
    """400 images of independent Gaussian grey levels in several shards."""
    x = np.random.default_rng(0).normal(0, STD, (400, 8, 8))
    np.save(tmp_path / "x.npy", np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8))
    location = str(tmp_path / "data")
    config = PrepareConfig(images_per_shard=90)
    prepare(open_source(f"npy:{tmp_path / 'x.npy'}"), config, location)
    return location, load_manifest(location)


def rows(location: str, manifest: Manifest, *, stride: int, num_images: int = 400) -> Tensor:
    plan = BoundPlan(location=location, num_images=num_images, stride=stride)
    schedule = build_schedule(TRAINED.diffusion)
    chunks = [
        bound_of_chunk(Optimal(schedule), schedule, UNCLIPPED, plan, trained=TRAINED, manifest=manifest, chunk=chunk)
        for chunk in range(plan.num_chunks)
    ]
    return torch.cat(chunks)


def likelihood(found: Tensor, stride: int) -> Likelihood:
    statistics = FeatureStatistics.empty(found.shape[1])
    statistics.update(found)
    return Likelihood(statistics=statistics, T=TRAINED.diffusion.T, stride=stride)


def test_prior_and_steps_are_the_closed_forms_of_the_optimal_denoiser(gaussian: tuple[str, Manifest]) -> None:
    location, manifest = gaussian
    schedule = build_schedule(TRAINED.diffusion)
    every = likelihood(rows(location, manifest, stride=1), 1)
    images = torch.cat([read_images(location, manifest, shard) for shard in range(len(manifest.shards))])
    total, error, prior, decoder, steps = every.values()
    assert prior == pytest.approx(float(prior_term(schedule, to_model_range(images)).mean()), rel=1e-9)
    alpha_bar, c = schedule.alphas_cumprod[1:], schedule.posterior_mean_coef_x0[1:]
    left = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    closed = float((0.5 * c**2 * left / schedule.posterior_variance[1:]).sum()) / math.log(2)
    assert steps == pytest.approx(closed, rel=0.02)
    assert total == pytest.approx(prior + decoder + steps)
    assert 0 < error < 0.01 * total

    few = likelihood(rows(location, manifest, stride=10), 10)
    assert few.values()[:1] == pytest.approx((total,), abs=4 * math.hypot(few.values()[1], error))
    assert few.values()[2:4] == pytest.approx((prior, decoder))


def test_an_image_has_the_same_terms_in_a_smaller_selection(gaussian: tuple[str, Manifest]) -> None:
    location, manifest = gaussian
    some, all_places = BoundPlan(location=location, num_images=60, stride=25), range(manifest.num_images)
    chosen = np.concatenate([some.places(manifest, chunk) for chunk in range(some.num_chunks)])
    assert len({*chosen.tolist()}) == 60
    assert {*chosen.tolist()} <= {*all_places}
    every = BoundPlan(location=location, num_images=400, stride=25)
    order = np.concatenate([every.places(manifest, chunk) for chunk in range(every.num_chunks)]).tolist()
    found, whole = rows(location, manifest, stride=25, num_images=60), rows(location, manifest, stride=25)
    torch.testing.assert_close(found, whole[[order.index(place) for place in chosen.tolist()]])


def test_the_table_has_a_line_for_each_run_of_steps_and_adds_up(gaussian: tuple[str, Manifest]) -> None:
    location, manifest = gaussian
    found = likelihood(rows(location, manifest, stride=20, num_images=50), 20)
    lines = list(csv.DictReader(found.to_csv().splitlines()))
    assert [(line["term"], line["first_t"], line["last_t"]) for line in lines] == [
        ("prior", "50", "50"),
        ("decoder", "0", "0"),
        ("step", "1", "20"),
        ("step", "21", "40"),
        ("step", "41", "49"),
    ]
    assert sum(float(line["bits_per_dimension"]) for line in lines) == pytest.approx(found.values()[0])


def test_images_read_one_by_one_are_those_of_their_shards_and_damage_is_named() -> None:
    location = prepare_digits()
    manifest = load_manifest(location)
    places = [0, 5, 700, manifest.num_images - 1]
    images, labels = read_chosen(location, manifest, places)
    every = torch.cat([read_images(location, manifest, shard) for shard in range(len(manifest.shards))])
    assert torch.equal(images, every[places])
    assert ((labels >= 0) & (labels < 10)).all()
    path = Path(shard_location(location, manifest.shards[0].name))
    data = bytearray(storage.read_bytes(str(path)))
    data[int(read_index(location, manifest, 0).offsets[0]) + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="its sha256 is not that of the index"):
        read_chosen(location, manifest, [0])


def test_a_model_of_classes_refuses_images_without_one(gaussian: tuple[str, Manifest]) -> None:
    location, manifest = gaussian
    trained = override(TRAINED, {"num_classes": 10})
    schedule = build_schedule(trained.diffusion)
    plan = BoundPlan(location=location, num_images=10, stride=25)
    with pytest.raises(UserError, match="the model knows 10 classes, some images have none"):
        bound_of_chunk(Optimal(schedule), schedule, UNCLIPPED, plan, trained=trained, manifest=manifest, chunk=0)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"metrics": ("bpd",)}, "--metrics bpd needs --held-out"),
        ({"held_out": "x", "bound_images": 1}, "--bound-images 1: must be at least 2"),
        ({"held_out": "x", "bound_stride": 0}, "--bound-stride 0: must be at least 1"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        EvaluateConfig(pending=True, **knobs)  # type: ignore[arg-type]
