import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import draws
from pipeline.config import SamplingConfig, TrainConfig, TuneConfig, to_flat
from pipeline.diffusion.noise_schedule import SCHEDULES
from pipeline.errors import UserError, WorldError
from pipeline.model_folder import build_unet
from pipeline.sweep.points import Listed, Proposed, open_source
from pipeline.sweep.record import Ended, SampledAs, SweepRecord
from pipeline.sweep.space import Point, Refused


def _points(config: TuneConfig) -> tuple[Sequence[Point], dict[str, Refused]]:
    source = open_source(config)
    assert isinstance(source, Listed)
    return source.points, source.refused


def _take_all(source: Proposed, value: float | None = 1.0) -> list[Point]:
    taken = []
    while (point := source.next()) is not None:
        taken.append(point)
        source.tell(point.key, value)
    return taken


def test_every_sound_combination_is_a_point_and_cosine_has_no_beta_range() -> None:
    config = TuneConfig(schedules=("linear", "cosine"), Ts=(100, 1000), beta_ranges=("1e-4:0.02", "1e-4:0.01"))
    points, refused = _points(config)
    keys = [point.key for point in points]
    assert len(keys) == len(set(keys))
    assert [key for key in keys if key.startswith("cosine")] == ["cosine-T100", "cosine-T1000"]
    assert all("beta_start" not in point.knobs for point in points if point.knobs["schedule"] == "cosine")
    assert len(points) + len(refused) == 6


def test_every_schedule_that_there_is_can_be_swept() -> None:
    points, _ = _points(TuneConfig(schedules=SCHEDULES, Ts=(1000,)))  # type: ignore[arg-type]
    assert [point.knobs["schedule"] for point in points] == list(SCHEDULES)


def test_the_offset_of_the_cosine_is_tried_for_the_cosine_alone() -> None:
    config = TuneConfig(Ts=(100,), search=("cosine_s=choice(0.008,0.02)", "beta_end=choice(0.02,0.03)"))
    points, _ = _points(config)
    assert [dict(point.knobs) for point in points] == [
        {"schedule": "linear", "T": 100, "beta_end": 0.02},
        {"schedule": "linear", "T": 100, "beta_end": 0.03},
        {"schedule": "cosine", "T": 100, "cosine_s": 0.008},
        {"schedule": "cosine", "T": 100, "cosine_s": 0.02},
    ]


def test_combinations_that_break_betas_or_leave_signal_are_refused_with_the_reason() -> None:
    config = TuneConfig(schedules=("linear",), Ts=(20, 1000), beta_ranges=("1e-4:0.02", "1e-4:0.001"))
    sampling = replace(SamplingConfig(), sampling_steps=10)
    points, refused = _points(replace(config, base=replace(TrainConfig(), sampling=sampling)))
    assert [point.key for point in points] == ["linear-T1000-beta0.0001-0.02"]
    assert refused.keys() == {
        "linear-T20-beta0.0001-0.02",
        "linear-T20-beta0.0001-0.001",
        "linear-T1000-beta0.0001-0.001",
    }
    assert all(entry.reason for entry in refused.values())


def test_a_T_below_the_protocols_sampling_steps_is_refused_since_all_trials_use_the_same_number() -> None:
    _, refused = _points(TuneConfig(schedules=("cosine",), Ts=(20, 100)))
    assert list(refused) == ["cosine-T20"]
    assert "--sampling-steps 50" in refused["cosine-T20"].reason


def test_guidance_of_a_base_without_classes_refuses_every_trial() -> None:
    base = replace(TrainConfig(), sampling=replace(SamplingConfig(), guidance=2.0))
    with pytest.raises(UserError, match=r"no trial left: .*--guidance 2: the model has no classes"):
        open_source(replace(TuneConfig(), base=base))


@pytest.mark.parametrize("algorithm", ["grid", "random", "optuna"])
def test_a_space_without_a_sound_combination_is_an_error(algorithm: str) -> None:
    with pytest.raises(UserError, match=r"no trial left: linear-T10-beta0\.0001-0\.02: "):
        open_source(TuneConfig(schedules=("linear",), Ts=(10,), algorithm=algorithm))  # type: ignore[arg-type]


def test_trials_differ_from_the_base_in_the_searched_knobs_and_the_seed_alone() -> None:
    config = TuneConfig(schedules=("cosine",), Ts=(100,), search=("lr=choice(0.001)",), seeds=2)
    first, second = _points(config)[0][0].trials(config)
    base = to_flat(config.base)
    changed = [
        {key for key, value in to_flat(t.config(config.base, "s")).items() if value != base[key]}
        for t in (first, second)
    ]
    assert changed == [{"schedule", "T", "lr", "name"}, {"schedule", "T", "lr", "name", "seed"}]
    assert first.config(config.base, "s").name == "s-cosine-T100-lr0.001"
    assert second.config(config.base, "s").name == "s-cosine-T100-lr0.001-seed1"


def test_trials_share_initial_weights_image_order_and_noise_whatever_their_schedule() -> None:
    config = TuneConfig(schedules=SCHEDULES, Ts=(1000,))  # type: ignore[arg-type]
    bases = [point.trials(config)[0].config(config.base, "s") for point in _points(config)[0]]
    weights = [torch.cat([p.flatten() for p in build_unet(c.model, seed=c.seed).parameters()]) for c in bases]
    assert all(torch.equal(weights[0], other) for other in weights[1:])
    for purpose in (draws.Purpose.TIMESTEP, draws.Purpose.NOISE, draws.Purpose.IMAGE_ORDER):
        numbers = [draws.standard_normal((8,), c.seed, purpose, 3, 1) for c in bases]
        assert all(torch.equal(numbers[0], other) for other in numbers[1:])
    assert len({(c.data, c.steps, c.sampling, c.model) for c in bases}) == 1


def test_a_searched_batch_size_keeps_the_number_of_images_that_a_trial_sees() -> None:
    base = replace(TrainConfig(), steps=100)
    config = TuneConfig(schedules=("cosine",), Ts=(100,), search=("batch_size=choice(32,48,64)",), base=base)
    points, refused = _points(config)
    steps = [point.trials(config)[0].config(base, "s").steps for point in points]
    assert steps == [200, 100]
    assert "no whole steps" in refused["cosine-T100-batch_size48"].reason


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("lr", "must be KNOB=choice"),
        ("lrr=choice(1)", "'lrr' is not one of"),
        ("lr=choice(a)", "'a' is no number"),
        ("schedule=choice(square)", "none of linear, cosine"),
        ("lr=uniform(1,0)", "first number must be below"),
        ("lr=loguniform(0,1)", "above 0"),
        ("lr=randint(1,2)", "whole numbers, which this knob does not take"),
        ("T=uniform(1,2)", "real numbers, which this knob does not take"),
        ("lr=choice()", "at least one value"),
        ("steps=choice(10,20)", "the same number of images"),
        ("seed=choice(1,2)", "--seeds runs each combination several times"),
        ("sampling_steps=choice(10,20)", "--sampling-search tries it on the trained models"),
        ("lr=loguniform(1e-5,1e-3)", "--algorithm grid tries every value"),
    ],
)
def test_a_search_that_cannot_be_run_fairly_is_refused_in_one_line(search: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(TuneConfig(search=(search,)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"objective": "train/loss"}, "do not compare; give one of fd"),
        ({"objective": "loss"}, "do not compare; give one of fd"),
        ({"objective": "is"}, "--objective is: must be one of fd"),
        ({"objective": "bpd"}, "--held-out"),
        ({"seeds": 0}, "--seeds 0: must be at least 1"),
    ],
)
def test_an_objective_that_says_nothing_about_schedules_is_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TuneConfig(**knobs)  # type: ignore[arg-type]


SPACE = (
    "T=randint(50,1000)",
    "beta_end=uniform(0.001,0.03)",
    "lr=loguniform(1e-4,1e-2)",
    "cosine_s=uniform(0.004,0.02)",
)


def test_random_points_are_sound_new_in_range_and_the_same_for_the_same_seed() -> None:
    config = TuneConfig(algorithm="random", num_trials=12, search=SPACE)
    points, refused = _points(config)
    assert [point.key for point in points] == [point.key for point in _points(config)[0]]
    assert len({point.key for point in points}) == 12
    assert refused  # a small beta_end leaves signal in x_T
    for point in points:
        assert 50 <= point.knobs["T"] <= 1000
        assert 1e-4 <= point.knobs["lr"] <= 1e-2
        assert ("cosine_s" in point.knobs) == (point.knobs["schedule"] == "cosine") != ("beta_end" in point.knobs)
    other = TuneConfig(algorithm="random", num_trials=12, search=SPACE, base=replace(TrainConfig(), seed=1))
    assert [point.key for point in points] != [point.key for point in _points(other)[0]]


def test_a_finite_space_gives_no_random_point_twice() -> None:
    points, _ = _points(TuneConfig(algorithm="random", num_trials=50))
    assert len(points) == 4


def test_optuna_proposes_sound_points_and_seeks_where_the_objective_is_small() -> None:
    config = TuneConfig(algorithm="optuna", num_trials=30, search=("lr=loguniform(1e-5,1e-1)",), Ts=(1000,))
    source = open_source(config)
    rates = []
    while (point := source.next()) is not None:
        rates.append(point.knobs["lr"])
        source.tell(point.key, abs(torch.tensor(point.knobs["lr"] / 1e-3).log().item()))
    assert len(rates) == 30
    late = sum(1e-4 < rate < 1e-2 for rate in rates[15:])
    assert late > sum(1e-4 < rate < 1e-2 for rate in rates[:10]) * 1.5


def test_optuna_goes_on_after_an_earlier_driver_without_a_point_twice() -> None:
    config = TuneConfig(algorithm="optuna", num_trials=8, search=SPACE)
    first = open_source(config)
    begun = [point for point in (first.next() for _ in range(4)) if point is not None]
    known = [(begun[0], 3.0, True), (begun[1], None, True), (begun[2], 1.0, True), (begun[3], None, False)]
    second = open_source(config, known)
    assert isinstance(second, Proposed)
    left = _take_all(second)
    assert left[0] == begun[3]
    assert len(left) == 5
    assert len({point.key for point in [*begun, *left]}) == 8


def test_a_record_comes_back_from_disk_as_it_was_and_a_damaged_one_is_named() -> None:
    config = TuneConfig(search=("channel_mult=choice([1,2],[1,2,2])",), Ts=(100,))
    points, refused = _points(config)
    ended = Ended(
        status="finished",
        step=20,
        value=1.5,
        rungs={10: 2.0},
        sampled=(SampledAs(knobs={"eta": 1.0}, value=2.0, identity="i"),),
    )
    record = SweepRecord(
        name="s", config=config, points={p.key: p for p in points}, refused=refused, ended={points[0].key: ended}
    )
    record.save()
    assert SweepRecord.load("s") == record
    assert SweepRecord.load("other") is None
    home = Path(os.environ["DDPM_HOME"])
    (home / "sweeps/s/sweep.json").write_text('{"version": 2}')
    with pytest.raises(WorldError, match=r"sweeps/s/sweep\.json is damaged or of another version"):
        SweepRecord.load("s")
