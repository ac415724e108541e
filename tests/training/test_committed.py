import json
import os
import sys
from pathlib import Path

import pytest
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

sys.path.append(str(Path(__file__).parent))

from worlds import run_one, small_task

from pipeline.errors import WorldError
from pipeline.training.audit import AuditLog
from pipeline.training.committed import SNAPSHOT, committed_checkpoints, damage, drop_damaged


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of steps 4 and 8, and Ray Train's snapshot of them."""
    run_one(small_task(tmp_path), tmp_path / "run")
    results = [{"version": 0, "checkpoint_dir_name": f"step-{step:08d}", "metrics": {"step": step}} for step in (4, 8)]
    snapshot = {
        "ray_version": "2.60.0",
        "checkpoint_results": results,
        "checkpoint_report_indices": [0, 1],
        "latest_checkpoint_result": results[1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 2,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (tmp_path / "run" / SNAPSHOT).write_text(json.dumps(snapshot))
    return tmp_path / "run"


def read_as_ray(run: Path) -> _CheckpointManagerState:
    return _CheckpointManagerState(**json.loads((run / SNAPSHOT).read_text()))


def test_a_whole_run_is_left_as_it_is(run: Path) -> None:
    before = (run / SNAPSHOT).read_bytes()
    assert not drop_damaged(str(run))
    assert (run / SNAPSHOT).read_bytes() == before
    assert committed_checkpoints(str(run)) == {step: str(run / f"step-{step:08d}") for step in (4, 8)}


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(
    run: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(run / "step-00000008" / name, 100)
    assert drop_damaged(str(run))
    state = read_as_ray(run)
    assert [result.checkpoint_dir_name for result in state.checkpoint_results] == ["step-00000004"]
    assert state.latest_checkpoint_result == state.checkpoint_results[0]
    assert (state.checkpoint_report_indices, state.current_report_index) == ([0], 2)
    assert len(caplog.messages) == 1
    assert f"going on from step-00000004, the newest whole checkpoint: {run}/step-00000008/{name}" in caplog.text
    assert not drop_damaged(str(run))


def test_a_missing_file_counts_as_damage(run: Path) -> None:
    (run / "step-00000008" / "optimizer.pt").unlink()
    reason = damage(str(run / "step-00000008"))
    assert reason == f"{run}/step-00000008/optimizer.pt is missing"
    assert drop_damaged(str(run))


def test_without_a_whole_checkpoint_one_line_names_the_files(run: Path) -> None:
    for step, name in ((4, "ema.safetensors"), (8, "model.safetensors")):
        os.truncate(run / f"step-{step:08d}" / name, 100)
    with pytest.raises(WorldError, match=r"is whole: .*8/model.* is damaged; .*4/ema.* is damaged"):
        drop_damaged(str(run))


@pytest.mark.parametrize("left", [0, 200])
def test_a_snapshot_that_was_cut_short_is_written_again_from_the_whole_checkpoints(run: Path, left: int) -> None:
    os.truncate(run / SNAPSHOT, left)
    (run / "step-00000012").mkdir()  # an upload that was not finished
    assert committed_checkpoints(str(run)) == {}
    assert drop_damaged(str(run))
    state = read_as_ray(run)
    assert [result.metrics for result in state.checkpoint_results] == [{"step": 4}, {"step": 8}]
    assert state.latest_checkpoint_result == state.checkpoint_results[-1]


def test_a_new_run_has_nothing_to_look_at(tmp_path: Path) -> None:
    assert not drop_damaged(str(tmp_path / "new"))
    assert committed_checkpoints(str(tmp_path / "new")) == {}


def test_half_a_line_of_a_killed_worker_is_dropped_from_the_audit(tmp_path: Path) -> None:
    file = tmp_path / "rank-00000-of-00001.jsonl"
    file.write_text('{"step": 0}\n{"step": 1, "ke')
    AuditLog(str(tmp_path), 0, 1).close()
    assert file.read_text() == '{"step": 0}\n'
