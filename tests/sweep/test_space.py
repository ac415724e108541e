from dataclasses import replace

import pytest

from pipeline.config import SamplingConfig, TrainConfig, TuneConfig, to_flat
from pipeline.errors import UserError
from pipeline.sweep.report import SweepResult, TrialResult
from pipeline.sweep.space import Refused, search_space


def test_every_sound_combination_is_a_trial_and_cosine_has_no_beta_range() -> None:
    config = TuneConfig(schedules=("linear", "cosine"), Ts=(100, 1000), beta_ranges=("1e-4:0.02", "1e-4:0.01"))
    trials, refused = search_space(replace(config, base=TrainConfig()))
    keys = [trial.key for trial in trials]
    assert len(keys) == len(set(keys))
    assert [key for key in keys if key.startswith("cosine")] == ["cosine-T100", "cosine-T1000"]
    assert all("beta_start" not in trial.knobs for trial in trials if trial.knobs["schedule"] == "cosine")
    assert len(trials) + len(refused) == 6


def test_combinations_that_break_betas_or_leave_signal_are_refused_with_the_reason() -> None:
    config = TuneConfig(schedules=("linear",), Ts=(20, 1000), beta_ranges=("1e-4:0.02", "1e-4:0.001"))
    trials, refused = search_space(replace(config, base=replace(TrainConfig(), sampling=_sampling(10))))
    assert [trial.key for trial in trials] == ["linear-T1000-beta0.0001-0.02"]
    assert {entry.key for entry in refused} == {
        "linear-T20-beta0.0001-0.02",
        "linear-T20-beta0.0001-0.001",
        "linear-T1000-beta0.0001-0.001",
    }
    assert all(entry.reason for entry in refused)


def test_a_T_below_the_protocols_sampling_steps_is_refused_since_all_trials_use_the_same_number() -> None:
    _, refused = search_space(TuneConfig(schedules=("cosine",), Ts=(20, 100)))
    assert [entry.key for entry in refused] == ["cosine-T20"]
    assert "--sampling-steps 50" in refused[0].reason


def test_guidance_of_a_base_without_classes_refuses_every_trial() -> None:
    base = replace(TrainConfig(), sampling=replace(SamplingConfig(), guidance=2.0))
    with pytest.raises(UserError, match=r"no trial left: .*--guidance 2: the model has no classes"):
        search_space(replace(TuneConfig(), base=base))


def test_a_space_without_a_sound_combination_is_an_error() -> None:
    with pytest.raises(UserError, match="no trial left"):
        search_space(TuneConfig(schedules=("linear",), Ts=(10,)))


def test_trials_differ_from_the_base_in_the_searched_knobs_alone() -> None:
    config = TuneConfig(schedules=("cosine",), Ts=(100,))
    trials, _ = search_space(config)
    flat, base = to_flat(trials[0].config(config.base, "sweep")), to_flat(config.base)
    assert {key for key in flat if flat[key] != base[key]} == {"schedule", "T", "name"}
    assert flat["name"] == "sweep-cosine-T100"


def _trial(schedule: str, value: float | None) -> TrialResult:
    return TrialResult(
        run=f"s-{schedule}",
        schedule=schedule,
        T=100,
        beta_start=None,
        beta_end=None,
        value=value,
        images_per_second=10.0,
        seconds=5.0,
        error=None if value is not None else "diverged",
    )


def _result(*trials: TrialResult) -> SweepResult:
    refused = [Refused(key="linear-T10", reason="beta above 1")]
    return SweepResult(
        name="s", run_id="r", metric="fid", identity="i", trials=trials, refused=refused, ui=["http://x"]
    )


def test_the_winner_is_the_trial_with_the_smallest_distance_and_failed_ones_are_told() -> None:
    result = _result(_trial("linear", 30.0), _trial("cosine", 20.0), _trial("sigmoid", None))
    assert result.winner is not None
    assert result.winner.schedule == "cosine"
    assert result.verdict().startswith("cosine T=100 won with fid 20.000, 10.000 (33.3%) ahead of linear T=100")
    assert "failed s-sigmoid: diverged" in result.text()
    assert "refused linear-T10: beta above 1" in result.text()
    assert result.to_csv().splitlines()[1].startswith("s-cosine,cosine,100")
    assert len(result.to_csv().splitlines()) == 4


def test_a_sweep_in_which_nothing_finished_has_no_winner() -> None:
    result = _result(_trial("linear", None))
    assert result.winner is None
    assert result.verdict() == "no trial finished"


def _sampling(steps: int) -> SamplingConfig:
    return replace(TrainConfig().sampling, sampling_steps=steps)
