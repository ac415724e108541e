"""One MLflow run that this process owns, until another driver takes it over."""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from pipeline import storage
from pipeline.errors import WorldError, first_line
from pipeline.tracking.checkpoints import EVAL_STATUS, MODEL_TYPE, RUN_NAME, STEP, published
from pipeline.tracking.outages import is_outage
from pipeline.tracking.ownership import (
    HEARTBEAT,
    HEARTBEAT_SECONDS,
    OWNER,
    RELEASED,
    Claim,
    latest_claim,
    try_claim,
    without_claims,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

__all__ = [
    "TIMESTAMP",
    "DataSetInput",
    "MetricRecord",
    "Status",
    "TakenOverError",
    "TrackedRun",
    "dataset_input",
    "one_line_errors",
]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
MetricRecord = Mapping[str, float]
"""Metric values by key, with the key ``step`` for the optimizer step and perhaps ``TIMESTAMP``."""

TIMESTAMP = "timestamp_ms"
"""When a record was made, in milliseconds since 1970; the time of sending when left out."""

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
            kind = storage.UnreachableError if is_outage(error) else WorldError
            raise kind(f"MLflow refused or is away: {first_line(error)}") from error

    return cast(F, wrapped)


class TakenOverError(WorldError):
    """The run belongs to another driver by now: this one may not write any more."""


class TrackedRun:
    """One MLflow run that this process owns and writes.

    A driver that was stopped or cut off for long may have been replaced: whatever writes asks first and raises
    ``TakenOverError`` then.
    """

    def __init__(self, client: "MlflowClient", run: "Run", claim: Claim) -> None:
        self._client = client
        self._claim = claim
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.name: str = run.info.run_name
        self.params: dict[str, str] = without_claims(run.data.params)
        self.is_new = not self.params
        self._last_beat = -HEARTBEAT_SECONDS

    @property
    def driver_number(self) -> int:
        """How many drivers have owned the run, with this one."""
        return self._claim.number

    def log_metrics(self, records: Sequence[MetricRecord]) -> None:
        """Logs metrics of many steps in few requests, each record whole or not at all; one sent again changes nothing.

        Raises:
            TakenOverError: Another driver owns the run.
            MlflowException: The server is away; what was logged before stays.
        """
        if not records:
            return
        self._check_owner()
        now = int(time.time() * 1000)
        for batch in _batches([_metrics(record, now) for record in records]):
            self._client.log_batch(self.run_id, metrics=batch)

    @one_line_errors
    def logged_steps(self, key: str) -> set[int]:
        """The steps for which a metric is logged: MLflow appends a step that is logged again at another time."""
        return {metric.step for metric in self._client.get_metric_history(self.run_id, key)}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run. Raises as ``log_metrics``."""
        from mlflow.entities import RunTag

        self._check_owner()
        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def own(self) -> None:
        """Says that this process writes the run from now on."""
        self._client.update_run(self.run_id, status="RUNNING")
        self.set_tags({OWNER: self._claim.owner, HEARTBEAT: str(int(time.time()))})
        self._last_beat = time.monotonic()

    def heartbeat(self) -> None:
        """Says that the driver is alive, at most every ``HEARTBEAT_SECONDS``. Raises as ``log_metrics``."""
        if time.monotonic() - self._last_beat >= HEARTBEAT_SECONDS:
            self.set_tags({HEARTBEAT: str(int(time.time()))})
            self._last_beat = time.monotonic()

    def log_grid(self, sheet: np.ndarray, step: int) -> None:
        """Logs a sample sheet, uint8 [H, W, C], under one key so that the UI shows a slider over the steps."""
        self._check_owner()
        self._client.log_image(self.run_id, sheet, key="samples", step=step, synchronous=True)

    def log_text(self, text: str, file_name: str) -> None:
        """Logs a text file as an artifact of the run."""
        self._check_owner()
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
        self._check_owner()
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
        """Ends the run with a truthful status and lets go of it.

        Raises:
            TakenOverError: Another driver owns the run, and its status is that driver's affair.
        """
        # The tag first: whoever finds the run RUNNING after a crash in between knows what to set.
        self.set_tags({RELEASED: f"{self._claim.number} {status}"})
        self._client.set_terminated(self.run_id, status)

    def _check_owner(self) -> None:
        latest = latest_claim(self._client.get_run(self.run_id))
        if latest is None or latest.token == self._claim.token:
            return
        if latest.ended and not latest.is_final:
            # MLflow was away for so long that a bystander took this driver for dead.
            again = Claim(number=latest.number + 1)
            if try_claim(self._client, self.run_id, again):
                self._claim = again
                self.own()
                return
            latest = latest_claim(self._client.get_run(self.run_id)) or latest
        if latest.ended:
            raise TakenOverError(f"run {self.name} was ended from outside: {latest.ended}")
        raise TakenOverError(f"another driver has taken over run {self.name} ({latest.owner}); this one ends")


def _metrics(record: MetricRecord, now: int) -> "list[Metric]":
    from mlflow.entities import Metric

    when, step = int(record.get(TIMESTAMP, now)), int(record["step"])
    return [Metric(key, value, when, step) for key, value in record.items() if key not in ("step", TIMESTAMP)]


def _batches(records: "Sequence[list[Metric]]") -> "Iterator[list[Metric]]":
    """Requests of at most ``_BATCH_METRICS`` metrics. Each is one transaction, so a record must not lie in two."""
    batch: list[Metric] = []
    for metrics in records:
        if batch and len(batch) + len(metrics) > _BATCH_METRICS:
            yield batch
            batch = []
        batch += metrics
    if batch:
        yield batch


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
