"""``benchmarks/load.py`` counts whatever MLflow lost: every metric of a record, checkpoints and sheets."""

import sys
from pathlib import Path

import pytest

from pipeline.tracking import Tracker

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

pytestmark = pytest.mark.slow


def test_a_value_of_any_metric_a_checkpoint_and_a_sheet_that_are_missing_are_counted(
    tracker: Tracker, tmp_path: Path
) -> None:
    load = pytest.importorskip("load")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "ema.safetensors").write_bytes(b"weights")
    run = tracker.start_run("counted", experiment="load", params={}, tags={})
    writer = load.Writer(run=run, checkpoint=checkpoint)
    for step in (1, 2):
        writer.window(step)
    writer.publish(2)
    assert writer.lost() == 0
    run.log_metrics([{"step": 3, "perf/step_ms": 1.0}])
    assert writer.lost() == 1
    writer.steps.append(3)
    assert writer.lost() == len(load._KEYS) - 1
    writer.published.append(3)
    assert writer.lost() == len(load._KEYS) - 1 + 2
