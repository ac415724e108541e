"""The train job: MLflow, Ray, the run, what follows it, and a summary that a person likes to read."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline import cluster
from pipeline.config import TrainConfig
from pipeline.errors import Interrupted
from pipeline.tracking import Tracker
from pipeline.training.background import Background
from pipeline.training.quality_task import Measure
from pipeline.training.task import TrainingTask, check_model, plan
from pipeline.training.trainer import TrainResult, fit, new_name

__all__ = ["Outcome", "train_run"]

logger = logging.getLogger(__name__)


class Distance(Protocol):
    """What an evaluation tells about the last checkpoint."""

    @property
    def metric(self) -> str:
        """Name of the distance."""
        ...

    @property
    def value(self) -> float:
        """The distance."""
        ...

    @property
    def num_images(self) -> int:
        """Images it was measured on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished job."""

    train: TrainResult
    distance: Distance | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        distance = self.distance
        return {
            "run": self.train.name,
            "run_id": self.train.run_id,
            "step": self.train.step,
            "loss": self.train.loss,
            "images_per_second": self.train.images_per_second,
            "metrics": dict(self.train.quality) | ({distance.metric: distance.value} if distance else {}),
            "grid": self.train.grid,
            "mlflow": self.train.ui,
            "seconds": round(self.seconds, 1),
        }

    def text(self) -> str:
        """The summary."""
        train, distance = self.train, self.distance
        rows = [("run", train.name), ("steps", f"{train.step:,}")]
        if train.loss is not None:
            rows.append(("loss", f"{train.loss:.4f}"))
        if train.images_per_second is not None:
            rows.append(("speed", f"{train.images_per_second:,.0f} images/s"))
        rows += [(metric.removeprefix("quality/"), f"{value:.1f}  (rough)") for metric, value in train.quality.items()]
        if distance is not None:
            rows.append((distance.metric, f"{distance.value:.3f}  ({distance.num_images:,} images, EMA weights)"))
        if train.grid is not None:
            rows.append(("samples", train.grid))
        rows.append(("MLflow", train.ui[0]))
        rows += [("", line) for line in train.ui[1:]]
        width = max(len(name) for name, _ in rows)
        return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows)])


def train_run(
    config: TrainConfig,
    *,
    then: Callable[[str, Tracker], Distance | None] | None = None,
    measure: Measure | None = None,
    live: bool = False,
) -> Outcome:
    """Trains, or continues, a run; starts Ray if no cluster is given.

    Args:
        config: The run's knobs.
        then: Called with the run's name once it is finished, in the same Ray session.
        measure: The distance that published checkpoints get beside training.
        live: Whether progress may be drawn as a bar, if stderr is a terminal.

    Raises:
        UserError: Config, data set or name is refused; nothing was started.
        WorldError: MLflow or Ray does not answer, or training failed.
        Interrupted: Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    config = replace(config, name=config.name or new_name(config))
    parameters = check_model(config)
    task = plan(config)
    # MLflow takes seconds to load and Ray to start, both mostly waiting.
    tracker_to_come: Future[Tracker] = Background("mlflow").submit(Tracker)
    workers = config.cluster
    for label, text in _facts(task, parameters):
        logger.info("%-8s  %s", label, text)
    with cluster.connect(num_cpus=workers.max_workers * workers.cpus_per_worker):
        tracker = tracker_to_come.result()
        result = fit(config, tracker, live=live, measure=measure)
        try:
            distance = then(result.name, tracker) if then else None
        except KeyboardInterrupt:
            raise Interrupted(result.name, result.step) from None
    return Outcome(train=result, distance=distance, seconds=time.monotonic() - started)


def _facts(task: TrainingTask, parameters: int) -> list[tuple[str, str]]:
    """What a person wants to see before anything starts."""
    config, manifest = task.config, task.manifest
    shape = f"{manifest.image_channels}x{manifest.image_size}x{manifest.image_size}"
    workers = config.cluster
    device = "GPUs" if workers.use_gpu else f"CPU, threads of each: {workers.cpus_per_worker}"
    return [
        ("run", str(config.name)),
        ("device", f"{workers.num_workers} workers on {device}"),
        ("network", f"{parameters:,} parameters"),
        ("data", f"{task.location}: {manifest.num_images:,} images of {shape}"),
        ("steps", f"{config.steps:,} of {config.data.batch_size} images"),
    ]
