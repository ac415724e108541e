"""The best model of an experiment becomes its champion in a real model registry, and only by like numbers."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
import numpy as np
import pytest
from publishing import prepare_digits, publish_run

from pipeline.config import EvaluateConfig, ProtocolConfig
from pipeline.errors import UserError
from pipeline.evaluation.champion import Scored, crown, is_clearly_better
from pipeline.evaluation.features import load_extractor
from pipeline.evaluation.metrics import metric_protocol
from pipeline.evaluation.selection import protocol_of, selected
from pipeline.serving import ImageModel
from pipeline.tracking import Tracker

WANTED = EvaluateConfig(pending=True)
METRIC = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A home with two runs, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", folder := str(tmp_path_factory.mktemp("champion")))
        prepare_digits()
        publish_run(Tracker(), "first", 10, 20)
        publish_run(Tracker(), "second", 10)
        yield folder


@pytest.fixture
def tracker(home: str, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setenv("DDPM_HOME", home)
    return Tracker()


def log(
    tracker: Tracker,
    config: EvaluateConfig,
    values: Mapping[tuple[str, int], float],
    standard_error: float | None = None,
) -> None:
    """Stores results, as evaluations do."""
    extractor = load_extractor(config.protocol.features)
    for candidate in selected(config, tracker):
        checkpoint = candidate.checkpoint
        if (value := values.get((checkpoint.run_name, checkpoint.step))) is not None:
            protocol = protocol_of(config, candidate, extractor)
            metrics = {protocol.metric: value}
            tracker.log_result(checkpoint, identity=protocol.identity, protocol=protocol.to_record(), metrics=metrics)
            if standard_error is not None:
                own = metric_protocol("fd-interval", protocol, extractor, config)
                metrics = {protocol.metric: value, f"{protocol.metric}_stderr": standard_error}
                tracker.log_result(checkpoint, identity=own.identity, protocol=own.to_record(), metrics=metrics)


def test_the_champion_changes_only_for_a_clearly_better_result_of_the_same_protocol(
    tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    assert crown(WANTED, tracker) is None, "nothing is measured yet"
    log(tracker, WANTED, {("first", 10): 100.0})
    assert crown(WANTED, tracker) == ("champion of ddpm: version 1, first step 10 with fd_efficientnet_lite0 100.0000")
    log(tracker, WANTED, {("second", 10): 99.0})
    assert crown(WANTED, tracker) is None, "within the margin"
    log(tracker, WANTED, {("first", 20): 50.0})
    found = crown(WANTED, tracker)
    assert found is not None
    assert found.startswith("champion of ddpm: version 2, first step 20 ")
    assert found.endswith(", before first step 10 with 100.0000")
    assert crown(WANTED, tracker) is None

    few = EvaluateConfig(pending=True, protocol=ProtocolConfig(num_images=50))
    log(tracker, few, {("second", 10): 1.0})
    with caplog.at_level(logging.INFO):
        assert crown(few, tracker) is None
    assert "the champion of ddpm has no result of this protocol and stays: num_images is 2000 and 50" in caplog.text
    named = EvaluateConfig(pending=True, protocol=ProtocolConfig(num_images=50), register="quick")
    assert crown(named, tracker) == "champion of quick: version 1, second step 10 with fd_efficientnet_lite0 1.0000"

    model = mlflow.pyfunc.load_model("models:/ddpm@champion")
    images = model.predict({"num_images": 3, "sample_seed": 5})
    assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    assert np.array_equal(images, model.predict({"num_images": 3, "sample_seed": 5}))
    assert not np.array_equal(images, model.predict({"num_images": 3, "sample_seed": 6}))
    (published,) = [entry for entry in tracker.checkpoints("1") if (entry.run_name, entry.step) == ("first", 20)]
    folder = Path(published.artifact_uri.removeprefix("file://"))
    # MLflow itself leaves a note of the model's name beside the files that it loads.
    names = {file.name for file in folder.iterdir()} - {"registered_model_meta"}
    assert names == {"MLmodel", "ema.safetensors", "meta.json"}


def scored(tracker: Tracker, value: float, standard_error: float | None) -> Scored:
    return Scored(checkpoint=tracker.checkpoints("1")[0], value=value, standard_error=standard_error)


@pytest.mark.parametrize(
    ("new", "error", "is_better"),
    [
        (97.9, None, True),
        (98.0, None, False),
        (120.0, None, False),
        (99.0, 0.3, True),  # 1.0 is more than 1.96 * 0.3 * sqrt(2) = 0.83
        (99.2, 0.3, False),
        (95.0, 3.0, False),
    ],
)
def test_a_distance_is_clearly_smaller_by_more_than_its_uncertainty_or_the_margin(
    tracker: Tracker, new: float, error: float | None, is_better: bool
) -> None:
    old = scored(tracker, 100.0, error)
    assert is_clearly_better(scored(tracker, new, error), old, margin=0.02) is is_better


def test_measured_intervals_decide_in_place_of_the_margin(tracker: Tracker) -> None:
    wanted = EvaluateConfig(pending=True, protocol=ProtocolConfig(num_images=70), register="intervals")
    log(tracker, wanted, {("first", 10): 100.0, ("second", 10): 99.0}, standard_error=0.1)
    assert crown(wanted, tracker) == f"champion of intervals: version 1, second step 10 with {METRIC} 99.0000"
    log(tracker, wanted, {("first", 20): 98.6}, standard_error=0.1)
    found = crown(wanted, tracker)
    assert found is not None, "0.4 is within the margin of 2 %, and more than 1.96 * 0.1 * sqrt(2)"
    assert found.endswith("before second step 10 with 99.0000")


def test_a_served_model_refuses_what_it_does_not_know(home: str) -> None:
    model = ImageModel(Path(home) / "models" / "first-10")
    with pytest.raises(UserError, match=r"unknown knob 'wings'; known: eta, .*sampling_steps"):
        model.predict({"wings": 2})
    with pytest.raises(UserError, match="num_images 0: must be at least 1"):
        model.predict(0)
    with pytest.raises(UserError, match="give a number of images, or a mapping of these: num_images"):
        model.predict("sixteen")
    with pytest.raises(UserError, match="the model has no classes"):
        model.predict({"num_images": 1, "guidance": 2.0})
