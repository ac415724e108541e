"""The train job: MLflow, Ray, the run, what follows it, and a summary that a person likes to read."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline import cluster
from pipeline.config import TrainConfig
from pipeline.tracking import Tracker
from pipeline.training.task import check_model, plan
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
            "metrics": {distance.metric: distance.value} if distance else {},
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
        if distance is not None:
            rows.append((distance.metric, f"{distance.value:.3f}  ({distance.num_images:,} images, EMA weights)"))
        if train.grid is not None:
            rows.append(("samples", train.grid))
        rows.append(("MLflow", train.ui[0]))
        rows += [("", line) for line in train.ui[1:]]
        width = max(len(name) for name, _ in rows)
        return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows)])


def train_run(config: TrainConfig, *, then: Callable[[str, Tracker], Distance | None] | None = None) -> Outcome:
    """Trains, or continues, a run; starts Ray if no cluster is given.

    Args:
        config: The run's knobs.
        then: Called with the run's name once it is finished, in the same Ray session.

    Raises:
        UserError: Config, data set or name is refused; nothing was started.
        WorldError: MLflow or Ray does not answer, or training failed.
    """
    started = time.monotonic()
    config = replace(config, name=config.name or new_name(config))
    parameters = check_model(config)
    task = plan(config)
    tracker = Tracker()
    workers = config.cluster
    logger.info(
        "run %s: %s parameters, %s images from %s, %s workers on %s, MLflow %s",
        config.name,
        f"{parameters:,}",
        f"{task.manifest.num_images:,}",
        task.location,
        workers.num_workers,
        "GPU" if workers.use_gpu else "CPU",
        tracker.shown_uri,
    )
    with cluster.connect(num_cpus=workers.max_workers * workers.cpus_per_worker):
        result = fit(config, tracker)
        distance = then(result.name, tracker) if then else None
    return Outcome(train=result, distance=distance, seconds=time.monotonic() - started)
