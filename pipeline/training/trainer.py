"""The Ray Train job around the loop, and the MLflow run around the job."""

import contextlib
import datetime
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import ray
import ray.train
from ray.train import Checkpoint, TrainingFailedError
from ray.train.torch import TorchTrainer

# ray.train exports these under the same names, but a type checker sees the first version's there.
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError
from ray.train.v2.api.result import Result

from pipeline import cluster, storage
from pipeline.config import TrainConfig
from pipeline.errors import Interrupted, UserError, WorldError, first_line
from pipeline.tracking import TakenOverError, TrackedRun, Tracker
from pipeline.training.arrow_errors import may_pass
from pipeline.training.commits import TellCommits
from pipeline.training.committed import committed_checkpoints, drop_damaged, runs_root
from pipeline.training.gauges import Gauges
from pipeline.training.identity import open_run
from pipeline.training.mailbox import Committed, Mailbox, open_mailbox
from pipeline.training.network import NodeAddressTorchConfig
from pipeline.training.progress import Several, open_progress
from pipeline.training.quality import Quality
from pipeline.training.quality_task import Measure
from pipeline.training.ray_worker import run_worker
from pipeline.training.recorder import Recorder
from pipeline.training.task import TrainingTask, plan

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["TrainResult", "fit", "new_name"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_MAX_OUTAGES, _OUTAGE_SECONDS = 3, 5.0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    name: str
    run_id: str
    experiment_id: str
    step: int
    loss: float | None
    images_per_second: float | None
    grid: str | None
    """Location of the last sample sheet, a PNG."""
    quality: Mapping[str, float]
    """The last distance measured beside training, by metric; empty without one."""
    ui: list[str]
    """What to type to see the run in MLflow."""


def new_name(config: TrainConfig) -> str:
    """A fresh name that says what the run is: preset, schedule, T, time."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    schedule = config.diffusion
    return f"{config.preset}-{schedule.schedule}-T{schedule.T}-{now}-{secrets.token_hex(2)}"


def fit(
    config: TrainConfig,
    tracker: Tracker,
    *,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    live: bool = False,
    measure: Measure | None = None,
    until: int | None = None,
) -> TrainResult:
    """Trains, or continues, the run called ``config.name`` on the Ray cluster this process has joined.

    Args:
        config: The run's knobs; without a name it gets a new one.
        tracker: Connected to MLflow.
        parent_run_id: The sweep's run, for a trial.
        tags: Further tags of the MLflow run.
        live: Whether progress may be drawn as a bar, if stderr is a terminal.
        measure: Measured for published checkpoints beside training; without it they get a sample sheet only.
        until: Stop at this step, a multiple of ``checkpoint_every``, and leave the rest to another call: learning rate
            and all else are those of a run to ``config.steps``.

    Raises:
        UserError: Config, data set or name is refused; nothing was started.
        WorldError: Training failed; the message carries the worker's own.
        Interrupted: Ctrl-C or SIGTERM.
    """
    config = replace(config, name=config.name or new_name(config))
    assert until is None or until % config.checkpoint_every == 0
    task = replace(plan(config), until=until)
    workers = config.cluster
    cluster.require(num_workers=workers.min_workers, cpus_per_worker=workers.cpus_per_worker, use_gpu=workers.use_gpu)
    run = open_run(task, tracker, parent_run_id, tags or {})
    for label, text in zip(("MLflow", ""), tracker.ui_command(run.run_id, run.experiment_id), strict=False):
        logger.info("%-8s  %s", label, text)
    gauges = Gauges(run.name)
    with _truthful_status(run), closing(Several(open_progress(config.steps, live=live), gauges)) as progress:
        mailbox = open_mailbox(run)
        folder = storage.join(runs_root(), run.name, "samples")
        quality = Quality(task, run, folder=folder, measure=measure, on_distance=progress.show_distance)
        recorder = Recorder(
            run,
            config,
            mailbox,
            tags={"data.digest": task.manifest.digest, "data.location": task.location, "weights": "ema"},
            quality=quality,
            progress=progress,
        )
        try:
            result = _train(task, run.name, mailbox, recorder)
            gauges.end()
            for checkpoint, metrics in result.best_checkpoints or []:
                recorder.publish(Committed(int(metrics["step"]), checkpoint))
            step = _step_reached(result)
        except WorldError:
            recorder.save_what_there_is()
            raise
        except KeyboardInterrupt:
            recorder.save_records()
            raise Interrupted(run.name, recorder.saved_step) from None
        try:
            recorder.finish()
        except KeyboardInterrupt:
            quality.stop()
            raise Interrupted(run.name, recorder.saved_step) from None
    record = recorder.last_record
    return TrainResult(
        name=run.name,
        run_id=run.run_id,
        experiment_id=run.experiment_id,
        step=step,
        loss=record.get("train/loss"),
        images_per_second=record.get("perf/images_per_second"),
        grid=quality.last_grid,
        quality=quality.distances,
        ui=tracker.ui_command(run.run_id, run.experiment_id),
    )


def _train(task: TrainingTask, name: str, mailbox: "ActorHandle[Mailbox]", recorder: Recorder) -> Result:
    """Runs the Ray Train job, again for each checkpoint that turns out to be damaged: there are fewer each time.

    And again when Ray's controller could not write to S3: workers wait for storage, the controller ends the run.
    """
    folder, patience = storage.join(runs_root(), name), task.config.data.storage_patience_seconds
    drop_damaged(folder, patience_seconds=patience)
    for step, location in committed_checkpoints(folder).items():
        recorder.publish(Committed(step, Checkpoint(location)))  # an earlier driver may have died before it was
    outages = 0
    while True:
        trainer = _trainer(task, name, mailbox)
        try:
            result = _run_beside(cast(Callable[[], Result], trainer.fit), recorder.turn)
        except storage.UnreachableError as error:
            if (outages := outages + 1) > _MAX_OUTAGES:
                raise
            logger.warning("training starts again from its last checkpoint: %s", first_line(error))
            _pause(_OUTAGE_SECONDS * 2 ** (outages - 1), recorder.turn)
            drop_damaged(folder, patience_seconds=patience)
            continue
        if not isinstance(result.return_value, str) or not drop_damaged(folder, patience_seconds=patience):
            return result
        cast(Any, ray).get(mailbox.try_again.remote())


class _Trainer(TorchTrainer):
    """Ray's, without processes that have nothing to do here: the start of each takes seconds."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = {"DatasetsCallback"}  # hands out Ray Data sets
        if cluster.is_private():
            idle.add("PlacementGroupCleanerCallback")  # frees what a dead controller held; the cluster ends with it
        all_of_them: list[Any] = cast(Any, super())._create_default_callbacks()
        return [each for each in all_of_them if type(each).__name__ not in idle]


def _trainer(task: TrainingTask, name: str, mailbox: "ActorHandle[Mailbox]") -> TorchTrainer:
    config, workers = task.config, task.config.cluster
    elastic = workers.min_workers < workers.max_workers
    cluster.set_patience(
        hung_after_seconds=workers.worker_timeout_seconds,
        barrier_seconds=_process_group_timeout(config),
        elastic=elastic,
    )
    return _Trainer(
        run_worker,  # type: ignore[arg-type]  # its return value comes back as result.return_value
        train_loop_config={"task": task.to_json(), "mailbox": mailbox},
        torch_config=NodeAddressTorchConfig(timeout_s=_process_group_timeout(config)),
        scaling_config=_scaling(config),
        run_config=RunConfig(  # type: ignore[arg-type]
            name=name,
            storage_path=runs_root(),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            failure_config=FailureConfig(
                max_failures=workers.max_failures,
                # A node that the cloud announces to take away is no failure of ours.
                max_preemption_failures=-1,
                # A group that cannot start. With MIN:MAX a dead node is asked for until Ray forgets it, each time.
                controller_failure_limit=-1 if elastic else 3,
            ),
            callbacks=[TellCommits(mailbox)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _step_reached(result: Result) -> int:
    if isinstance(result.return_value, str):
        raise WorldError(f"training failed: {result.return_value}")
    return int(result.return_value or 0)


def _process_group_timeout(config: TrainConfig) -> int:
    """A worker whose loader waits for storage must not be taken for one that hangs."""
    return math.ceil(config.cluster.worker_timeout_seconds + config.data.storage_patience_seconds)


def _scaling(config: TrainConfig) -> ScalingConfig:
    workers = config.cluster
    resources = {"CPU": float(workers.cpus_per_worker)} | ({"GPU": 1.0} if workers.use_gpu else {})
    elastic = workers.min_workers < workers.max_workers
    return ScalingConfig(
        num_workers=(workers.min_workers, workers.max_workers) if elastic else workers.max_workers,
        use_gpu=workers.use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=workers.resize_seconds,
    )


@contextlib.contextmanager
def _truthful_status(run: TrackedRun) -> Iterator[None]:
    """Ends the MLflow run as what it was: FINISHED, FAILED, or KILLED by Ctrl-C or SIGTERM."""
    try:
        yield
    except KeyboardInterrupt:
        _end(run, "KILLED")
        raise
    except BaseException:
        _end(run, "FAILED")
        raise
    run.finish("FINISHED")


def _end(run: TrackedRun, status: Literal["FAILED", "KILLED"]) -> None:
    """Another error is on its way: MLflow being away as well must not hide it."""
    try:
        run.finish(status)
    except TakenOverError:
        pass  # its status is its new driver's affair
    except WorldError as error:
        logger.warning("the run could not be marked %s: %s", status, error)


def _run_beside(call: Callable[[], Result], turn: Callable[[], None]) -> Result:
    """Runs ``fit`` in a thread while this one records; here, so that Ctrl-C and SIGTERM reach this thread at once."""
    future: Future[Result] = Future()

    def target() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: after Ctrl-C the thread still waits for Ray and must not keep the process alive.
    threading.Thread(target=target, name="ray-train-fit", daemon=True).start()
    while not future.done():
        turn()
        time.sleep(_POLL_SECONDS)
    try:
        return future.result()
    except TrainingFailedError as error:
        kind = storage.UnreachableError if _storage_failed(error) else WorldError
        raise kind(f"training failed: {_cause(error)}") from error


def _pause(seconds: float, turn: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        turn()
        time.sleep(_POLL_SECONDS)


def _storage_failed(error: TrainingFailedError) -> bool:
    """Whether Ray's controller failed in a request to S3 that may succeed later."""
    return isinstance(error, ControllerError) and may_pass(error.controller_failure)


def _cause(error: TrainingFailedError) -> str:
    """The first worker's own message; Ray wraps it into several layers and a traceback."""
    failures = getattr(error, "worker_failures", None) or {}
    for _, failure in sorted(failures.items()):
        if isinstance(inner := getattr(failure, "cause", failure), WorldError | UserError):
            return str(inner)
    first = next(iter(failures.values()), error)
    return first_line(Exception(str(first).strip().splitlines()[-1]))
