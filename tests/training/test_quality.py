"""In-training quality: which checkpoint is measured when, what becomes of the result, and the real Ray task."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from measurements import ByHand, Thread
from worlds import run_one, small_task

from pipeline.config import TrainConfig
from pipeline.evaluation.quality import RoughDistance
from pipeline.tracking import TrackedRun, Tracker
from pipeline.training import quality as quality_module
from pipeline.training.quality import Quality, start_task
from pipeline.training.quality_task import Job, chunk_sizes, run
from pipeline.training.task import TrainingTask

Trained = tuple[TrainingTask, Path]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """Checkpoints of steps 4 and 8."""
    task = small_task(tmp_path, grid_images=4, name="run")
    run_one(task, tmp_path / "out")
    return task, tmp_path / "out"


def new_run() -> TrackedRun:
    return Tracker().start_run("run", experiment="ddpm", params={}, tags={})


def folder_of(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def job_of(trained: Trained, step: int, measure: Any = None) -> Job:
    task, out = trained
    folder = folder_of(out, step)
    return Job(
        step=step,
        weights=(folder / "ema.safetensors").read_bytes(),
        meta=(folder / "meta.json").read_bytes(),
        grid_images=4,
        location=task.location,
        manifest=task.manifest,
        measure=measure,
        use_gpu=False,
    )


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages of the package, without those of MLflow."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("pipeline")]


def sheets_of(run: TrackedRun) -> list[str]:
    files = Tracker().client.list_artifacts(run.run_id, "images")
    return sorted(file.path for file in files if file.path.endswith(".png"))


def by_hand(trained: Trained, tmp_path: Path, **options: Any) -> tuple[Quality, ByHand, TrackedRun]:
    hand, run = ByHand(), new_run()
    measure = RoughDistance(num_images=8)
    quality = Quality(trained[0], run, folder=str(tmp_path / "grids"), measure=measure, start=hand, **options)
    return quality, hand, run


def test_the_sheet_is_the_first_chunk_and_the_chunks_are_as_many_images_as_wanted() -> None:
    assert chunk_sizes(64, 256) == [64, 64, 64, 64]
    assert chunk_sizes(64, 200) == [64, 64, 64, 8]
    assert chunk_sizes(4, 70) == [4, 64, 2]
    assert chunk_sizes(64, 10) == [64]
    assert chunk_sizes(64, 0) == [64]


def test_the_knob_turns_the_distance_off_and_its_name_says_what_it_is() -> None:
    assert RoughDistance.of(replace(TrainConfig(), quality_images=0)) is None
    rough = RoughDistance.of(replace(TrainConfig(), quality_images=32))
    assert rough is not None
    assert rough.metric == "quality/fd_efficientnet_lite0_32"


def test_the_distance_of_the_data_set_from_itself_is_zero_and_its_statistics_are_kept(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.shards import read_images
    from pipeline.evaluation import quality as module

    task, _ = trained
    images = [read_images(task.location, task.manifest, shard) for shard in range(len(task.manifest.shards))]
    everything = RoughDistance(num_images=task.manifest.num_images)
    device = torch.device("cpu")
    first = everything.distance(images, task.location, task.manifest, device)
    assert first == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(module, "read_images", lambda *_: pytest.fail("the statistics were computed again"))
    assert everything.distance(images, task.location, task.manifest, device) == first
    white = [torch.full((16, 1, 8, 8), 255, dtype=torch.uint8)]
    assert RoughDistance(num_images=16).distance(white, task.location, task.manifest, device) > 10


def test_a_measurement_is_a_function_of_the_checkpoint(trained: Trained) -> None:
    first, second = (run(job_of(trained, 8, RoughDistance(num_images=8))) for _ in range(2))
    assert first.problem is None
    assert first.distance == second.distance
    assert np.array_equal(first.sheet, second.sheet)
    assert np.array_equal(first.sheet, run(job_of(trained, 8)).sheet)


def test_the_newest_checkpoint_is_measured_first_and_older_ones_that_wait_are_dropped(
    trained: Trained, tmp_path: Path
) -> None:
    quality, hand, _ = by_hand(trained, tmp_path)
    folder = folder_of(trained[1], 8)
    quality.offer(1, folder)
    assert quality.turn() == []
    for step in (2, 4, 3):
        quality.offer(step, folder)
    quality.turn()
    assert hand.started == [1], "one at a time"
    hand.end(1, distance=90.0)
    records = quality.turn()
    assert [(r["step"], r["quality/fd_efficientnet_lite0_8"]) for r in records] == [(1, 90.0)]
    assert hand.started == [1, 4]


def test_at_the_end_an_older_measurement_is_given_up_for_the_last(trained: Trained, tmp_path: Path) -> None:
    seen: list[float] = []
    quality, hand, run = by_hand(trained, tmp_path, on_distance=seen.append)
    folder = folder_of(trained[1], 8)
    quality.offer(4, folder)
    quality.turn()
    quality.offer(8, folder)
    threading.Timer(0.3, lambda: hand.end(8, distance=70.0)).start()
    records = quality.finish()
    assert (hand.started, hand.cancelled) == ([4, 8], [4])
    assert [record["step"] for record in records] == [8]
    assert seen == [70.0]
    assert quality.distances == {"quality/fd_efficientnet_lite0_8": 70.0}
    assert quality.last_grid == str(tmp_path / "grids" / "step-00000008.png")
    assert len(sheets_of(run)) == 1


def test_a_measurement_that_fails_is_one_line_and_the_next_one_follows(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quality, hand, _ = by_hand(trained, tmp_path)
    folder = folder_of(trained[1], 8)
    quality.offer(4, folder)
    quality.turn()
    quality.offer(8, folder)
    hand.futures[4].set_exception(RuntimeError("the worker died\nand left a long story"))
    assert quality.turn() == []
    assert ours(caplog) == ["the checkpoint of step 4 could not be measured: the worker died"]
    hand.end(8, problem="ValueError: no\nfeatures")
    quality.finish()
    assert ours(caplog)[1:] == ["step 8 has no distance: ValueError: no"]
    assert (tmp_path / "grids" / "step-00000008.png").exists(), "the sheet is not lost with the distance"


def test_an_interrupt_does_not_wait(trained: Trained, tmp_path: Path) -> None:
    quality, hand, _ = by_hand(trained, tmp_path)
    quality.offer(4, folder_of(trained[1], 4))
    quality.turn()
    quality.offer(8, folder_of(trained[1], 8))
    quality.stop()
    assert hand.cancelled == [4]
    assert quality.finish() == []
    assert hand.started == [4]


def test_a_sheet_that_mlflow_does_not_take_is_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality, hand, run = by_hand(trained, tmp_path)
    real, refusals = TrackedRun.log_grid, iter([True, True, False])

    def flaky(self: TrackedRun, *arguments: Any) -> None:
        if next(refusals):
            raise MlflowException("away")
        real(self, *arguments)

    monkeypatch.setattr(TrackedRun, "log_grid", flaky)
    monkeypatch.setattr(quality_module, "_RETRY_SECONDS", 0.0)
    quality.offer(8, folder_of(trained[1], 8))
    quality.turn()
    hand.end(8)
    quality.finish()
    assert len(sheets_of(run)) == 1


def test_a_later_driver_finds_that_the_last_sheet_is_missing(trained: Trained, tmp_path: Path) -> None:
    quality, hand, _ = by_hand(trained, tmp_path)
    assert quality.lacks(8)
    assert not quality.lacks(4), "only the last one always gets one"
    quality.offer(8, folder_of(trained[1], 8))
    assert not quality.lacks(8)
    quality.turn()
    hand.end(8)
    quality.finish()
    assert not by_hand(trained, tmp_path)[0].lacks(8)


def test_weights_that_are_not_finite_are_one_line(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, out = trained
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "meta.json").write_bytes((folder_of(out, 8) / "meta.json").read_bytes())
    (broken / "ema.safetensors").write_bytes(b"no weights")
    quality = Quality(task, new_run(), folder=str(tmp_path / "grids"), start=Thread)
    quality.offer(8, broken)
    quality.finish()
    assert len(ours(caplog)) == 1
    assert "ema.safetensors is damaged" in ours(caplog)[0]


@dataclass(frozen=True, kw_only=True)
class Witness:
    """A measure that tells of the process it runs in."""

    folder: str
    seconds: float = 0.0
    metric: str = "quality/priority"
    num_images: int = 6

    def distance(self, images: Iterable[Tensor], location: str, manifest: Any, device: torch.device) -> float:
        count = sum(len(part) for part in images)
        (Path(self.folder) / f"{os.getpid()}").write_text(str(count))
        time.sleep(self.seconds)
        return os.nice(0) + torch.get_num_threads() / 10


@pytest.fixture
def local_ray() -> Iterator[None]:
    from pipeline import cluster

    with cluster.connect(num_cpus=1):
        import ray

        # Workers cannot import the tests.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def wait_for(condition: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_as_a_ray_task_it_needs_no_cpu_has_the_lowest_priority_and_survives_its_process(
    trained: Trained, tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    caplog.set_level(logging.INFO)
    task, out = trained
    run, pids = new_run(), tmp_path / "pids"
    pids.mkdir()

    @ray.remote(num_cpus=1)
    class Worker:
        def pid(self) -> int:
            return os.getpid()

    worker = Worker.remote()  # type: ignore[attr-defined]  # holds the only CPU
    ray.get(worker.pid.remote())
    quality = Quality(
        task, run, folder=str(tmp_path / "grids"), measure=Witness(folder=str(pids), seconds=3), start=start_task
    )
    quality.offer(4, folder_of(out, 4))
    quality.turn()
    wait_for(lambda: list(pids.iterdir()))
    first = int(next(pids.iterdir()).name)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(list(pids.iterdir())) == 2)
    records = quality.finish()
    assert [(record["step"], record["quality/priority"]) for record in records] == [(4, 19.1)]
    assert {path.read_text() for path in pids.iterdir()} == {"6"}
    assert len(sheets_of(run)) == 1
    with Image.open(str(quality.last_grid)) as picture:
        assert picture.size[0] >= 512
    assert [message for message in ours(caplog) if "could not" in message] == []
    # A process serves one measurement: none with low priority is left for other tasks.
    wait_for(lambda: not any(psutil.pid_exists(int(path.name)) for path in pids.iterdir()))


@pytest.mark.slow
def test_a_cancelled_ray_task_makes_room_for_the_last_checkpoint(
    trained: Trained, tmp_path: Path, local_ray: None
) -> None:
    task, out = trained
    pids = tmp_path / "pids"
    pids.mkdir()
    run = new_run()
    quality = Quality(task, run, folder=str(tmp_path / "grids"), measure=Witness(folder=str(pids), seconds=600))
    quality.offer(4, folder_of(out, 4))
    quality.turn()
    wait_for(lambda: list(pids.iterdir()))
    quality._measure = RoughDistance(num_images=8)
    quality.offer(8, folder_of(out, 8))
    records = quality.finish()
    assert [record["step"] for record in records] == [8]
    assert records[0]["quality/fd_efficientnet_lite0_8"] > 0
