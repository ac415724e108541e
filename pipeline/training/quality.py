"""In-training quality beside training: published checkpoints get a sample sheet and a rough distance.

One Ray task at a time, the newest checkpoint first. Whatever happens to a task is one line of a log: it touches
neither training nor publication.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.errors import first_line
from pipeline.images import encode_png
from pipeline.model_folder import EMA_FILE, META_FILE
from pipeline.tracking import TIMESTAMP, TrackedRun
from pipeline.training.background import Background
from pipeline.training.quality_task import Job, Measure, Measured, measure
from pipeline.training.task import TrainingTask
from pipeline.training.worker import Record

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["Quality", "Running", "start_task"]

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 10.0
_PATIENCE_SECONDS = 120.0
# How long a finished run waits for its last measurement. A large network on a CPU would take longer: its distance is
# then left to an evaluation.
_LAST_SECONDS = 300.0
_POLL_SECONDS = 0.1


class Running(Protocol):
    """A measurement under way."""

    def done(self) -> bool:
        """Whether ``result`` would not wait."""
        ...

    def result(self) -> Measured:
        """The measurement; raises what it raised."""
        ...

    def cancel(self) -> object:
        """Ends it without waiting."""
        ...


class _RayTask:
    def __init__(self, reference: "ObjectRef[Measured]") -> None:
        self._reference = reference

    def done(self) -> bool:
        return bool(ray.wait([self._reference], timeout=0)[0])

    def result(self) -> Measured:
        return ray.get(self._reference)

    def cancel(self) -> None:
        ray.cancel(self._reference, force=True)


def start_task(job: Job, num_gpus: float) -> Running:
    """Starts a measurement as a Ray task, on the driver's node if that has the GPU it asks for.

    It holds no CPU, so that it never waits for one. A process serves one measurement: its low priority must not pass
    to whatever Ray would run in it next.
    """
    near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    task = cast(Any, ray).remote(num_cpus=0, max_calls=1, max_retries=2)(measure)
    reference = task.options(num_gpus=num_gpus, scheduling_strategy=near).remote([ray.put(job)])
    return _RayTask(reference)


class Quality:
    """Which checkpoint is measured when, and where the result goes. ``turn`` is called about twice a second."""

    def __init__(
        self,
        task: TrainingTask,
        run: TrackedRun,
        *,
        folder: str,
        measure: Measure | None = None,
        on_distance: Callable[[float], None] = lambda value: None,
        start: Callable[[Job, float], Running] = start_task,
    ) -> None:
        """Measures nothing yet.

        Args:
            task: The run's config and data set.
            run: Where sheets are logged.
            folder: Where sample sheets are written as PNG files.
            measure: The distance; without it only sheets are made.
            on_distance: Told of each distance.
            start: Starts a measurement.
        """
        self._task, self._run, self._folder = task, run, folder
        self._measure, self._on_distance, self._start = measure, on_distance, start
        self._lock = threading.Lock()
        self._waiting: Job | None = None
        self._running: Running | None = None
        self._running_step = -1
        self._records: list[Record] = []
        self._unlogged: list[Measured] = []
        self._sheets = Background("sheets")
        self._logging: Future[None] | None = None
        self._next_try = 0.0
        self.last_grid: str | None = None
        self.distances: dict[str, float] = {}

    def offer(self, step: int, model_folder: Path) -> None:
        """Asks for the measurement of a checkpoint; one that still waits is dropped if it is older. Any thread."""
        config = self._task.config
        job = Job(
            step=step,
            weights=(model_folder / EMA_FILE).read_bytes(),
            meta=(model_folder / META_FILE).read_bytes(),
            grid_images=config.grid_images,
            location=self._task.location,
            manifest=self._task.manifest,
            measure=self._measure,
            use_gpu=config.quality_gpus > 0,
        )
        with self._lock:
            if self._waiting is None or self._waiting.step <= step:
                self._waiting = job

    def lacks(self, step: int) -> bool:
        """Whether this is the run's last step and nobody has made its sheet: an earlier driver was ended before."""
        with self._lock:
            known = self._running_step == step or (self._waiting is not None and self._waiting.step == step)
        return step == self._task.config.steps and not known and not storage.exists(self._grid(step))

    def turn(self) -> list[Record]:
        """Takes what is done, starts what waits, logs sheets; returns records of distances. Never raises."""
        if self._running is not None and self._running.done():
            self._take(self._running)
            self._running = None
        with self._lock:
            waiting = self._waiting if self._running is None else None
            if waiting is not None:
                self._waiting, self._running_step = None, waiting.step
        if waiting is not None:
            try:
                self._running = self._start(waiting, self._task.config.quality_gpus)
            except Exception as error:  # For example an object store that is full.
                logger.warning("the checkpoint of step %d is not measured: %s", waiting.step, first_line(error))
        self._log_sheets()
        records, self._records = self._records, []
        return records

    def finish(self) -> list[Record]:
        """Measures the last checkpoint; an older one that is under way is given up. Returns records as ``turn``."""
        records = self.turn()
        if self._waiting is not None and self._running is not None:
            self._running.cancel()
            self._running = None
        if (self._waiting or self._running) and self._lacks_gpus():
            self.stop()
        if self._waiting or self._running:
            words = "measuring the last checkpoint, at most %.0f s; --quality-images 0 measures none"
            if self._task.config.quality_images == 0:
                words = "drawing the last checkpoint's samples, at most %.0f s"
            logger.info(words, _LAST_SECONDS)
        give_up = time.monotonic() + _LAST_SECONDS
        while (self._waiting or self._running) and time.monotonic() < give_up:
            records += self.turn()
            time.sleep(_POLL_SECONDS)
        if self._waiting or self._running:
            logger.warning("the last checkpoint was not measured in time: python jobs/evaluate.py measures it")
            self.stop()
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while self._unlogged and time.monotonic() < give_up:
            records += self.turn()
            time.sleep(_POLL_SECONDS)
        return records

    def stop(self) -> None:
        """Gives up what is under way, without waiting."""
        self._waiting = None
        if self._running is not None:
            self._running.cancel()
            self._running = None

    def _lacks_gpus(self) -> bool:
        wanted = self._task.config.quality_gpus
        if wanted == 0 or ray.cluster_resources().get("GPU", 0) >= wanted:  # type: ignore[no-untyped-call]
            return False
        logger.warning("the last checkpoint is not measured: --quality-gpus %g, the cluster has fewer", wanted)
        return True

    def _take(self, running: Running) -> None:
        try:
            measured = running.result()
        except Exception as error:
            reason = first_line(getattr(error, "cause", None) or error)
            logger.warning("the checkpoint of step %d could not be measured: %s", self._running_step, reason)
            return
        if measured.problem is not None:
            logger.warning("step %d has no distance: %s", measured.step, measured.problem.splitlines()[0])
        if measured.distance is not None and self._measure is not None:
            # Not the time of sending: a record that is sent twice is then the same record to MLflow.
            now = time.time() * 1000
            self._records.append({"step": measured.step, TIMESTAMP: now, self._measure.metric: measured.distance})
            self.distances = {self._measure.metric: measured.distance}
            self._on_distance(measured.distance)
        self._unlogged.append(measured)

    def _log_sheets(self) -> None:
        """In a thread: MLflow may be slow or away, and signs of life must not wait for it."""
        if self._logging is not None and self._logging.done():
            done, self._logging = self._logging, None
            if (error := done.exception()) is None:
                self._unlogged.pop(0)
            else:
                self._next_try = time.monotonic() + _RETRY_SECONDS
                logger.warning("a sample sheet is kept and logged later (%s)", first_line(error))
        if self._logging is None and self._unlogged and time.monotonic() >= self._next_try:
            self._logging = self._sheets.submit(self._log_sheet, self._unlogged[0])

    def _log_sheet(self, measured: Measured) -> None:
        self.last_grid = self._grid(measured.step)
        storage.write_bytes(self.last_grid, encode_png(torch.from_numpy(measured.sheet.copy())))
        self._run.log_grid(measured.sheet.transpose(1, 2, 0), measured.step)

    def _grid(self, step: int) -> str:
        return storage.join(self._folder, f"step-{step:08d}.png")
