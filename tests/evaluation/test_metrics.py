"""What each metric is called, depends on and needs; and the features of the data set that they are compared with."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import METRICS, EvaluateConfig
from pipeline.errors import UserError, WorldError
from pipeline.evaluation import feature_sample, reference
from pipeline.evaluation.feature_sample import FeatureSample
from pipeline.evaluation.metrics import Gathered, compute, metric_protocol, needs_sample, score_accumulator
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.reference import reference_sample, reference_statistics
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance

DIM = 8
CONFIG = EvaluateConfig(pending=True)
OF_IMAGES = [metric for metric in METRICS if metric != "bpd"]


class Extractor:
    """Stands for a feature network; features are made by the tests."""

    name, sha256, resize, dim = "inception", "0" * 64, "299", DIM

    def __init__(self, metric: str = "fid") -> None:
        self.metric = metric


def protocol(metric: str = "fid") -> Protocol:
    return Protocol(
        metric=metric,
        features="inception",
        features_sha256="ab" * 32,
        resize="bilinear",
        rounding="half up",
        reference_digest="cd" * 32,
        num_images=300,
        chunk_size=100,
        threads=1,
        device="cpu",
        weights="ema",
        sampler="ddim(eta=0)",
        sampling_steps=50,
        sample_seed=0,
    )


def features(n: int, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) + shift


def gathered(generated: torch.Tensor, real: torch.Tensor) -> Gathered:
    statistics = []
    for x in (generated, real):
        statistics.append(FeatureStatistics.empty(DIM))
        statistics[-1].update(x)
    return Gathered(generated=statistics[0], reference=statistics[1], sample=generated, reference_sample=real)


NAMES = {
    "fd": {"fid"},
    "fd-interval": {"fid", "fid_stderr", "fid_low", "fid_high"},
    "fd-infinity": {"fid_infinity"},
    "kid": {"kid", "kid_stderr"},
    "prdc": {"precision_inception", "recall_inception", "density_inception", "coverage_inception"},
}


@pytest.mark.parametrize("metric", list(NAMES))
def test_values_come_under_the_metrics_names_the_protocols_first(metric: str):
    extractor: Any = Extractor()
    found = metric_protocol(metric, protocol(), extractor, CONFIG)
    values = compute(metric, gathered(features(300), features(300, seed=1)), found, extractor)
    assert values.keys() == NAMES[metric]
    assert next(iter(values)) == found.metric
    assert all(isinstance(value, float) for value in values.values())


def test_names_on_other_features_and_of_other_weights_say_so():
    extractor: Any = Extractor("fd_efficientnet_lite0")
    of_distance = protocol("fd_efficientnet_lite0-ema-power-0.080")
    for metric, name in (
        ("kid", "kd_efficientnet_lite0"),
        ("prdc", "precision_efficientnet_lite0"),
        ("fd-infinity", "fd_efficientnet_lite0_infinity"),
    ):
        found = metric_protocol(metric, of_distance, extractor, CONFIG)
        assert found.metric == f"{name}-ema-power-0.080"
        values = compute(metric, gathered(features(300), features(300, seed=1)), found, extractor)
        assert all(key.endswith("-ema-power-0.080") for key in values)
        assert next(iter(values)) == found.metric


def test_each_metric_has_an_identity_of_its_own_and_the_distance_keeps_the_one_it_had():
    extractor: Any = Extractor()
    protocols = {metric: metric_protocol(metric, protocol(), extractor, CONFIG) for metric in OF_IMAGES}
    assert protocols["fd"].identity == protocol().identity
    assert "settings" not in protocols["fd"].to_record()
    assert len({entry.identity for entry in protocols.values()}) == len(OF_IMAGES)
    assert all(entry.to_record().get("settings") for metric, entry in protocols.items() if metric != "fd")


def test_the_interval_holds_the_distance_in_its_middle():
    extractor: Any = Extractor()
    both = gathered(features(300), features(300, seed=1, shift=1))
    values = compute("fd-interval", both, metric_protocol("fd-interval", protocol(), extractor, CONFIG), extractor)
    middle = (values["fid_low"] + values["fid_high"]) / 2
    assert middle == pytest.approx(frechet_distance(both.generated, both.reference))
    assert values["fid_high"] - values["fid_low"] == pytest.approx(2 * 1.96 * values["fid_stderr"], rel=1e-4)


def test_worse_images_are_worse_by_every_metric():
    extractor: Any = Extractor()
    real = features(300, seed=1)
    found = []
    for shift in (0.0, 1.0, 3.0):
        values = {}
        for metric in NAMES:
            own = metric_protocol(metric, protocol(), extractor, CONFIG)
            values |= compute(metric, gathered(features(300, shift=shift), real), own, extractor)
        found.append(values)
    for name in ("fid", "fid_infinity", "kid", "fid_low"):
        assert found[0][name] < found[1][name] < found[2][name]
    for name in NAMES["prdc"]:
        assert found[0][name] > found[1][name] > found[2][name] - 1e-9


def test_precision_and_recall_count_both_sets_with_one_number():
    extractor: Any = Extractor()
    own = metric_protocol("prdc", protocol(), extractor, CONFIG)
    many, few = features(300), features(100, seed=1)
    assert compute("prdc", gathered(many, few), own, extractor) == compute(
        "prdc", gathered(many[:100], few), own, extractor
    )


@pytest.mark.parametrize(("metric", "n"), [("kid", 19), ("prdc", 5), ("fd-infinity", 7)])
def test_too_few_images_are_refused_by_metric_and_number(metric: str, n: int):
    extractor: Any = Extractor()
    own = metric_protocol(metric, protocol(), extractor, CONFIG)
    with pytest.raises(WorldError, match=rf"^{own.metric} cannot be computed: .*here are {n}"):
        compute(metric, gathered(features(n), features(300)), own, extractor)


def test_single_features_are_kept_only_for_the_metrics_that_need_them():
    assert needs_sample(["fd", "is"]) == (False, False)
    assert needs_sample(["fd-interval"]) == (True, False)
    assert needs_sample(["fd", "prdc"]) == (True, True)


def test_an_inception_score_of_other_features_is_refused():
    extractor: Any = Extractor("fd_efficientnet_lite0")
    with pytest.raises(UserError, match="tells no classes; give --features inception"):
        score_accumulator(extractor, 100)


class Shards:
    """Features of a data set of 30 images in three shards; counts the passes."""

    def __init__(self) -> None:
        self.features, self.passes = features(30, seed=7), 0

    def shards(self, location: str, manifest: Any) -> Iterator[torch.Tensor]:
        self.passes += 1
        yield from self.features.split([12, 1, 17])


MANIFEST: Any = SimpleNamespace(digest="ef" * 32, num_images=30)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDPM_HOME", str(tmp_path))
    return tmp_path


def test_statistics_and_sample_of_a_data_set_come_from_one_pass_and_are_kept(home: Path):
    shards, extractor = Shards(), Extractor()
    sample = reference_sample("somewhere", MANIFEST, extractor, shards)  # type: ignore[arg-type]
    statistics = reference_statistics("somewhere", MANIFEST, extractor, shards)  # type: ignore[arg-type]
    assert shards.passes == 1
    torch.testing.assert_close(statistics.mean.float(), shards.features.mean(0))
    assert not torch.equal(sample, shards.features)
    assert torch.equal(sample.sort(0).values, shards.features.sort(0).values)
    assert torch.equal(reference_sample("somewhere", MANIFEST, extractor, shards), sample)  # type: ignore[arg-type]
    assert shards.passes == 1


def test_a_sample_is_drawn_from_all_shards(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "MOST_FEATURES", 15)
    shards = Shards()
    sample = reference_sample("somewhere", MANIFEST, Extractor(), shards)  # type: ignore[arg-type]
    places = [int((shards.features == row).all(1).nonzero()) for row in sample]
    assert len(set(places)) == 15
    assert min(places) < 12
    assert max(places) > 12
    assert places != sorted(places)


def test_a_damaged_sample_is_computed_anew_with_a_warning(home: Path, caplog: pytest.LogCaptureFixture):
    shards = Shards()
    sample = reference_sample("somewhere", MANIFEST, Extractor(), shards)  # type: ignore[arg-type]
    (file,) = home.glob(f"cache/reference/*-sample-{feature_sample.MOST_FEATURES}.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        again = reference_sample("somewhere", MANIFEST, Extractor(), shards)  # type: ignore[arg-type]
    assert torch.equal(again, sample)
    assert "is damaged and computed anew" in caplog.text


def test_accumulated_features_are_those_that_metrics_get():
    sample = FeatureSample(DIM)
    for part in features(300).split(70):
        sample.update(part)
    assert torch.equal(sample.features, features(300))
