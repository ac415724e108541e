import pytest

from pipeline.config import SamplingConfig, TrainConfig, TuneConfig
from pipeline.errors import UserError
from pipeline.sweep.record import SampledAs
from pipeline.sweep.report import SweepResult, TrialResult
from pipeline.sweep.sampling_search import ways_to_sample
from pipeline.sweep.space import Refused
from pipeline.sweep.verdict import Score, compare, verdict


def _trial(
    schedule: str, value: float | None, *, seed: int = 0, status: str | None = None, **more: object
) -> TrialResult:
    return TrialResult(
        run=f"s-{schedule}",
        point=f"{schedule}-T100",
        seed=seed,
        status=status or ("finished" if value is not None else "failed"),  # type: ignore[arg-type]
        schedule=schedule,
        T=100,
        beta_start=None,
        beta_end=None,
        value=value,
        images_per_second=10.0,
        seconds=5.0,
        error=None if value is not None else "diverged",
        **more,  # type: ignore[arg-type]
    )


def _result(*trials: TrialResult) -> SweepResult:
    refused = [Refused(key="linear-T10", reason="beta above 1")]
    return SweepResult(
        name="s", run_id="r", metric="fid", identity="i", trials=trials, refused=refused, ui=["http://x"]
    )


def _score(words: str, *values: float, num_trials: int | None = None) -> Score:
    return Score(words=words, schedule=words, values=values, num_trials=num_trials or len(values))


def test_the_winner_is_the_trial_with_the_smallest_distance_and_failed_ones_are_told() -> None:
    result = _result(_trial("linear", 30.0), _trial("cosine", 20.0), _trial("sigmoid", None))
    assert result.winner is not None
    assert result.winner.schedule == "cosine"
    assert result.verdict().startswith("cosine T=100 won with fid 20.000, 10.000 (33.3%) ahead of linear T=100")
    assert "one seed each, so a small lead may be chance" in result.verdict()
    assert "failed s-sigmoid: diverged" in result.text()
    assert "refused linear-T10: beta above 1" in result.text()
    assert result.to_csv().splitlines()[1].startswith("s-cosine,,cosine-T100,0,finished,cosine,100")
    assert len(result.to_csv().splitlines()) == 4


def test_a_sweep_in_which_nothing_finished_has_no_winner() -> None:
    result = _result(_trial("linear", None))
    assert result.winner is None
    assert result.verdict() == "no trial finished"


def test_seeds_of_a_combination_are_averaged_and_one_with_a_stopped_seed_does_not_win() -> None:
    trials = [_trial("linear", value, seed=seed) for seed, value in enumerate([30.0, 31.0])]
    trials += [_trial("cosine", 20.0), _trial("cosine", None, seed=1, status="stopped")]
    result = _result(*trials)
    assert result.winner is not None
    assert result.winner.run == "s-linear"
    assert result.verdict().startswith("linear T=100 won with fid 30.500 ± 0.500 (mean and standard error of 2 seeds)")
    assert "stopped at 0" in result.text()


def test_welchs_test_has_the_value_of_a_worked_example() -> None:
    # By scipy.stats.ttest_ind(a, b, equal_var=False).
    from scipy.stats import ttest_ind

    a, b = [19.1, 20.3, 20.0, 19.8], [20.9, 22.4, 21.2]
    found = compare(_score("a", *a), _score("b", *b))
    wanted = ttest_ind(b, a, equal_var=False)
    assert found is not None
    assert (found.t, found.p) == pytest.approx((wanted.statistic, wanted.pvalue))


def test_the_verdict_says_whether_the_lead_is_more_than_the_seeds_spread() -> None:
    clear = verdict("fd", [_score("cosine", 1.0, 1.1, 0.9), _score("linear", 3.0, 3.2, 2.9)])
    assert clear.startswith(
        "cosine won with fd 1.000 ± 0.058 (mean and standard error of 3 seeds), 2.033 (67.0%) ahead"
    )
    assert "more than the seeds' spread explains (Welch t = " in clear
    close = verdict("fd", [_score("cosine", 1.0, 3.0), _score("linear", 1.5, 2.9)])
    assert close.startswith("no winner: cosine has the smallest fd 2.000")
    assert "within the seeds' spread" in close


def test_the_verdict_names_the_best_of_another_schedule() -> None:
    first, second, third = _score("cosine", 1.0), _score("cosine", 2.0), _score("linear", 4.0)
    assert verdict("fd", [first, second, third]).endswith("the best of another schedule, linear, is 3.000 behind")


def test_identical_seeds_have_no_spread_and_equal_means_no_winner() -> None:
    assert compare(_score("a", 1.0, 1.0), _score("b", 1.0, 1.0)) is not None
    assert verdict("fd", [_score("a", 1.0, 1.0), _score("b", 1.0, 1.0)]).startswith("no winner")
    assert verdict("fd", [_score("a", 1.0, 1.0), _score("b", 2.0, 2.0)]).startswith("a won")


def test_what_was_sampled_without_training_is_in_the_table_best_first_with_its_protocol() -> None:
    sampled = [SampledAs(knobs={"sampling_steps": n}, value=v, identity=f"id{n}") for n, v in ((5, 9.0), (10, 7.0))]
    text = _result(_trial("cosine", 8.0, sampled=sampled)).text()
    assert text.index("sampling_steps=10  7.000  id10") < text.index("sampling_steps=5   9.000  id5")


def test_ways_to_sample_leave_out_what_a_sampler_lacks() -> None:
    config = TuneConfig(sampling_search=("sampler=choice(ddim,ddpm)", "eta=choice(0,1)", "sampling_steps=choice(5,10)"))
    assert ways_to_sample(config) == [
        {"sampler": "ddim", "eta": 0.0, "sampling_steps": 5},
        {"sampler": "ddim", "eta": 0.0, "sampling_steps": 10},
        {"sampler": "ddim", "eta": 1.0, "sampling_steps": 5},
        {"sampler": "ddim", "eta": 1.0, "sampling_steps": 10},
        {"sampler": "ddpm", "sampling_steps": 5},
        {"sampler": "ddpm", "sampling_steps": 10},
    ]
    assert TrainConfig().sampling == SamplingConfig()


@pytest.mark.parametrize(
    "text", ["lr=choice(1)", "eta=uniform(0,1)", "sampler=choice(euler)", "sampling_steps=choice(0)"]
)
def test_a_sampling_search_that_needs_training_or_has_no_end_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        ways_to_sample(TuneConfig(sampling_search=(text,)))
