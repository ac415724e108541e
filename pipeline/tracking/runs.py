"""One MLflow run that this process owns, and who may own it."""

import functools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import psutil

from pipeline import storage
from pipeline.errors import UserError, WorldError, first_line
from pipeline.tracking.checkpoints import EVAL_STATUS, MODEL_TYPE, RUN_NAME, STEP, published

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "STALE_SECONDS",
    "TIMESTAMP",
    "DataSetInput",
    "MetricRecord",
    "TrackedRun",
    "dataset_input",
    "one_line_errors",
    "refuse_if_live",
]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
MetricRecord = Mapping[str, float]
"""Metric values by key, with the key ``step`` for the optimizer step and perhaps ``TIMESTAMP``."""

TIMESTAMP = "timestamp_ms"
"""When a record was made, in milliseconds since 1970; the time of sending when left out."""

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
"""A RUNNING run whose driver has been silent for this long may be taken over."""

_OWNER, _HEARTBEAT = "ddpm.owner", "ddpm.heartbeat"
_BATCH_METRICS = 900  # a batch takes at most 1,000


@dataclass(frozen=True, kw_only=True)
class DataSetInput:
    """The data set of a run, as MLflow records it."""

    name: str
    location: str
    digest: str
    profile: Mapping[str, Any]


F = TypeVar("F", bound=Callable[..., Any])


def one_line_errors(method: F) -> F:
    """MLflow lets through whatever its store raises; a person gets one line and exit code 1."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return method(*args, **kwargs)
        except (MlflowException, ConnectionError) as error:
            raise WorldError(f"MLflow refused or is away: {first_line(error)}") from error

    return cast(F, wrapped)


class TrackedRun:
    """One MLflow run that this process owns and writes."""

    def __init__(self, client: "MlflowClient", run: "Run") -> None:
        self._client = client
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.name: str = run.info.run_name
        self.params: dict[str, str] = dict(run.data.params)
        self._last_beat = 0.0

    def log_metrics(self, records: Sequence[MetricRecord]) -> None:
        """Logs metrics of many steps in few requests. Raises ``MlflowException`` if the server is away."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, int(record.get(TIMESTAMP, now)), int(record["step"]))
            for record in records
            for key, value in record.items()
            if key not in ("step", TIMESTAMP)
        ]
        for start in range(0, len(metrics), _BATCH_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH_METRICS])

    @one_line_errors
    def last_step(self, key: str) -> int:
        """The last step for which a metric was logged, -1 if none: MLflow appends a step that is logged again."""
        return max((metric.step for metric in self._client.get_metric_history(self.run_id, key)), default=-1)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def own(self) -> None:
        """Says that this process writes the run from now on."""
        self._client.set_tag(self.run_id, _OWNER, _owner())
        self.heartbeat()

    def heartbeat(self) -> None:
        """Says that the driver is alive, at most every ``HEARTBEAT_SECONDS``."""
        if time.monotonic() - self._last_beat >= HEARTBEAT_SECONDS:
            self._client.set_tag(self.run_id, _HEARTBEAT, str(int(time.time())))
            self._last_beat = time.monotonic()

    def log_grid(self, sheet: np.ndarray, step: int) -> None:
        """Logs a sample sheet, uint8 [H, W, C], under one key so that the UI shows a slider over the steps."""
        self._client.log_image(self.run_id, sheet, key="samples", step=step, synchronous=True)

    def log_text(self, text: str, file_name: str) -> None:
        """Logs a text file as an artifact of the run."""
        self._client.log_text(self.run_id, text, file_name)

    @one_line_errors
    def published_steps(self) -> set[int]:
        """Steps whose checkpoint is already published."""
        return {checkpoint.step for checkpoint in published(self._client, self.experiment_id, self.run_id)}

    def publish(self, folder: Path, step: int, tags: Mapping[str, str]) -> str:
        """Publishes a model folder as a LoggedModel that awaits evaluation; visible only once it is whole.

        Returns:
            The model's id.
        """
        model = self._client.create_logged_model(
            self.experiment_id,
            name=f"{self.name.replace('.', '_')}-step-{step:08d}",  # MLflow allows no dots there
            source_run_id=self.run_id,
            model_type=MODEL_TYPE,
            tags={**tags, RUN_NAME: self.name, STEP: str(step), EVAL_STATUS: "pending"},
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    @one_line_errors
    def finish(self, status: Status) -> None:
        """Ends the run with a truthful status."""
        self._client.set_terminated(self.run_id, status)


def _owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def refuse_if_live(client: "MlflowClient", run: "Run") -> None:
    """Refuses a run whose driver lives. Of a driver on another machine only its heartbeat can tell, so that is watched:
    a retried job, whose first driver died a moment ago, waits until it is sure and then goes on.
    """
    owner, first_beat = run.data.tags.get(_OWNER, ":0"), run.data.tags.get(_HEARTBEAT, "0")
    host, _, pid = owner.rpartition(":")
    here = host == socket.gethostname()
    if run.info.status != "RUNNING" or owner == _owner() or (here and not psutil.pid_exists(int(pid))):
        return
    beat = first_beat
    while not here and beat == first_beat and (silent := time.time() - float(beat)) < STALE_SECONDS:
        logger.info("run %s: waiting to see whether its driver %s is alive", run.info.run_name, owner)
        time.sleep(min(5.0, STALE_SECONDS - silent))
        beat = client.get_run(run.info.run_id).data.tags.get(_HEARTBEAT, "0")
    if beat == first_beat and time.time() - float(beat) >= STALE_SECONDS:
        return
    raise UserError(
        f"run {run.info.run_name!r} is being written by a live driver ({owner}, last seen "
        f"{time.time() - float(beat):.0f} s ago); wait for it, end it, or choose another --name"
    )


def dataset_input(data_set: DataSetInput) -> Any:
    """A data set as MLflow's own entity."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(
        name=data_set.name,
        digest=data_set.digest[:36],  # MLflow's limit
        source_type="s3" if storage.is_remote(data_set.location) else "local",
        source=json.dumps({"uri": data_set.location}),
        profile=json.dumps(dict(data_set.profile)),
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", "training")])
