"""Stored results side by side, from a real MLflow store; numbers that do not compare are refused with the reason."""

from collections.abc import Iterator

import pytest
from publishing import prepare_digits, publish_run

from pipeline.config import EvaluateConfig, ProtocolConfig
from pipeline.errors import UserError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.features import load_extractor
from pipeline.evaluation.selection import protocol_of, protocols_of, selected
from pipeline.tracking import Tracker

METRIC = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A home with measured runs, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", folder := str(tmp_path_factory.mktemp("compare")))
        prepare_digits()
        for name in ("first", "second", "other", "bare"):
            publish_run(Tracker(), name, 10, 20)
        both = {"fd": {METRIC: 0.0}, "fd-interval": {METRIC: 0.0, f"{METRIC}_stderr": 1.0}}
        log("first", {10: 70.0, 20: 50.0}, num_images=2000, metrics=both)
        log("second", {10: 58.0, 20: 51.0}, num_images=2000, metrics=both)
        log("other", {20: 40.0}, num_images=500, metrics={"fd": {METRIC: 0.0}})
        yield folder


@pytest.fixture
def tracker(home: str, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setenv("DDPM_HOME", home)
    return Tracker()


def log(run: str, values: dict[int, float], *, num_images: int, metrics: dict[str, dict[str, float]]) -> None:
    """Stores results, as evaluations do."""
    wanted = tuple(metrics)
    config = EvaluateConfig(run=run, protocol=ProtocolConfig(num_images=num_images), metrics=wanted)  # type: ignore[arg-type]
    tracker, extractor = Tracker(), load_extractor("efficientnet-lite0")
    for candidate in selected(config, tracker):
        if (value := values.get(candidate.checkpoint.step)) is None:
            continue
        for metric, own in protocols_of(config, protocol_of(config, candidate, extractor), extractor).items():
            tracker.log_result(
                candidate.checkpoint,
                identity=own.identity,
                protocol=own.to_record(),
                metrics=metrics[metric] | {METRIC: value},
            )


def test_results_of_one_protocol_stand_side_by_side_the_best_first(tracker: Tracker) -> None:
    found = compare(["first", "second", "first:10"], tracker)
    with_error = next(table for table in found.tables if table.rows[0].standard_error is not None)
    assert [(row.run, row.step, row.value) for row in with_error.rows] == [
        ("first", 20, 50.0),
        ("second", 20, 51.0),
        ("first", 10, 70.0),
    ]
    assert with_error.lines()[1:] == [
        "  first step 20   50.0000 +- 1.96",
        "  second step 20  51.0000 +- 1.96  1 behind, within the error of the difference",
        "  first step 10   70.0000 +- 1.96  20 behind, beyond the error of the difference",
    ]
    assert len(found.tables) == 2
    assert found.to_json()["tables"][0]["rows"][0]["run"] == "first"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["first", "other"],
            "^first step 20 and other step 20 have no result of one protocol: num_images is 2000 and 500;",
        ),
        (
            ["first", "nobody"],
            "--compare nobody: no run is called 'nobody'; give RUN or RUN:STEP; the newest are: bare",
        ),
        (["first:15", "second"], r"--compare first:15: no result at step 15; there are results at \[10, 20\]"),
        (["first", "bare"], "--compare bare: no checkpoint of 'bare' has a result yet; evaluate it first: --run bare"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(tracker: Tracker, names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compare(names, tracker)


def test_one_name_is_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="--compare first: give two or more, RUN or RUN:STEP"):
        EvaluateConfig(compare=("first",))
