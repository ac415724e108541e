from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from pipeline.config import TrainConfig, TuneConfig
from pipeline.errors import UserError
from pipeline.sweep.bookkeeping import task_of, trial_of
from pipeline.sweep.points import Listed, open_source
from pipeline.sweep.record import Ended, SweepRecord
from pipeline.sweep.searcher import TrialSearcher, rungs_of, stopping

STOPPING = TuneConfig(
    early_stopping=True, reduction_factor=2, base=replace(TrainConfig(), steps=100, checkpoint_every=10)
)


def _searcher(config: TuneConfig, record: SweepRecord) -> TrialSearcher:
    return TrialSearcher(config, record, open_source(config))


def _suggested(searcher: TrialSearcher) -> list[str]:
    found = []
    while (task := searcher.suggest("any")) != Searcher.FINISHED:
        found.append(trial_of(task).key)
    return found


def test_a_trial_survives_the_way_through_tunes_config() -> None:
    config = TuneConfig(schedules=("linear",), search=("channel_mult=choice([1,2,2])",), seeds=2)
    source = open_source(config)
    assert isinstance(source, Listed)
    trials = [trial for point in source.points for trial in point.trials(config)]
    assert [trial_of(task_of(trial)) for trial in trials] == trials
    assert trials[0].config(config.base, "s").model.channel_mult == (1, 2, 2)


def test_each_point_comes_with_all_its_seeds_and_is_on_record_before_its_first_trial_starts() -> None:
    config = TuneConfig(schedules=("cosine",), Ts=(10, 100, 1000), seeds=2)
    record = SweepRecord(name="s", config=config)
    searcher = _searcher(config, record)
    assert searcher.has_work()
    saved = SweepRecord.load("s")
    assert saved is not None
    assert list(saved.points) == ["cosine-T100"]
    assert list(saved.refused) == ["cosine-T10"]
    assert _suggested(searcher) == ["cosine-T100", "cosine-T100-seed1", "cosine-T1000", "cosine-T1000-seed1"]


def test_what_has_ended_is_not_run_again_but_a_further_seed_is() -> None:
    config = TuneConfig(schedules=("cosine",), seeds=2)
    ended = {"cosine-T100": Ended(status="finished", value=1.0), "cosine-T1000": Ended(status="failed")}
    assert _suggested(_searcher(config, SweepRecord(name="s", config=config, ended=ended))) == [
        "cosine-T100-seed1",
        "cosine-T1000-seed1",
    ]
    once = replace(config, seeds=1)
    assert not _searcher(once, SweepRecord(name="s", config=once, ended=ended)).has_work()


def test_rungs_are_checkpoints_before_the_last_step() -> None:
    assert rungs_of(STOPPING) == (10, 20, 40, 80)
    assert rungs_of(replace(STOPPING, first_rung=30, reduction_factor=3)) == (30, 90)
    assert rungs_of(replace(STOPPING, early_stopping=False)) == ()
    with pytest.raises(UserError, match="multiple of --checkpoint-every 10"):
        rungs_of(replace(STOPPING, first_rung=15))
    with pytest.raises(UserError, match="not before the last"):
        rungs_of(replace(STOPPING, first_rung=100))


def test_a_restored_sweep_stops_trials_by_what_earlier_trials_were_worth() -> None:
    ended = {str(n): Ended(status="stopped", step=10, rungs={10: float(n)}) for n in range(1, 5)}
    decisions = {}
    for value in (0.5, 4.5):
        scheduler = stopping(STOPPING, SweepRecord(name="s", config=STOPPING, ended=ended))
        trial: Any = SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        decisions[value] = scheduler.on_trial_result(None, trial, {"step": 10, "objective": value})  # type: ignore[arg-type]
    assert decisions == {0.5: TrialScheduler.CONTINUE, 4.5: TrialScheduler.STOP}


def test_a_trial_that_was_let_pass_a_rung_goes_on_and_counts_there() -> None:
    ended = {"1": Ended(status="finished", step=100, rungs={10: 1.0})}
    scheduler = stopping(STOPPING, SweepRecord(name="s", config=STOPPING, ended=ended))
    decisions = []
    for number, goes_on in enumerate((True, False, False)):
        trial: Any = SimpleNamespace(trial_id=f"new-{number}")
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        report = {"step": 10, "objective": 2.0 - 0.1 * number, "goes_on": goes_on}
        decisions.append(scheduler.on_trial_result(None, trial, report))  # type: ignore[arg-type]
    # The third is better than the median of the first three; without the one that was let pass it would not be.
    assert decisions == [TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.CONTINUE]
