"""The one seam to MLflow: runs, metrics, sample grids, published checkpoints and their results.

The driver is the only writer. It connects (and creates the default store) before any worker starts, since several
processes that create one sqlite store at the same time corrupt it.
"""

import functools
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import psutil

from pipeline import storage
from pipeline.errors import UserError, WorldError, first_line

# An outage must not hold the driver for minutes: few short retries here, records are kept and sent later instead.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run

__all__ = ["TIMESTAMP", "Checkpoint", "DataSetInput", "MetricRecord", "TrackedRun", "Tracker"]

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
_RUN_NAME, _STEP, _EVAL_STATUS = "run_name", "step", "eval_status"
# Without it the UI guesses from the contents and may show the pages for language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_MODEL_TYPE = "ddpm-checkpoint"
_BATCH_METRICS = 900  # a batch takes at most 1,000


@dataclass(frozen=True, kw_only=True)
class DataSetInput:
    """The data set of a run, as MLflow records it."""

    name: str
    location: str
    digest: str
    profile: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published checkpoint: a READY LoggedModel with the EMA weights and ``meta.json``."""

    model_id: str
    run_id: str
    run_name: str
    step: int
    artifact_uri: str
    tags: Mapping[str, str]

    def has_result(self, identity: str) -> bool:
        """Whether a result of the protocol with this identity is already there."""
        return _protocol_tag(identity) in self.tags

    def result(self, identity: str) -> dict[str, Any]:
        """The stored result: ``metrics`` and ``protocol``."""
        record: dict[str, Any] = json.loads(self.tags[_protocol_tag(identity)])
        return record


F = TypeVar("F", bound=Callable[..., Any])


def _one_line_errors(method: F) -> F:
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

    def __init__(self, tracker: "Tracker", run: "Run") -> None:
        self._tracker = tracker
        self._client = tracker.client
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

    @_one_line_errors
    def last_step(self, key: str) -> int:
        """The last step for which a metric was logged, -1 if none: MLflow appends a step that is logged again."""
        return max((metric.step for metric in self._client.get_metric_history(self.run_id, key)), default=-1)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

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

    @_one_line_errors
    def published_steps(self) -> set[int]:
        """Steps whose checkpoint is already published."""
        return {checkpoint.step for checkpoint in self._tracker.checkpoints(self.experiment_id, run_id=self.run_id)}

    def publish(self, folder: Path, step: int, tags: Mapping[str, str]) -> str:
        """Publishes a model folder as a LoggedModel that awaits evaluation; visible only once it is whole.

        Returns:
            The model's id.
        """
        model = self._client.create_logged_model(
            self.experiment_id,
            name=f"{self.name.replace('.', '_')}-step-{step:08d}",  # MLflow allows no dots there
            source_run_id=self.run_id,
            model_type=_MODEL_TYPE,
            tags={**tags, _RUN_NAME: self.name, _STEP: str(step), _EVAL_STATUS: "pending"},
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    @_one_line_errors
    def finish(self, status: Status) -> None:
        """Ends the run with a truthful status."""
        self._client.set_terminated(self.run_id, status)


class Tracker:
    """A connection to one MLflow store."""

    def __init__(self) -> None:
        """Connects to ``MLFLOW_TRACKING_URI``, else to ``mlflow.db`` under ``$DDPM_HOME``, created if missing.

        Raises:
            WorldError: The server does not answer, or the store cannot be opened.
            UserError: ``$DDPM_HOME`` is remote and no tracking URI is given.
        """
        self.uri = _tracking_uri()
        if self.uri.startswith("http"):
            _check_reachable(self.uri)
        import mlflow
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            mlflow.set_tracking_uri(self.uri)
            self.client: MlflowClient = MlflowClient(self.uri)
            self.client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError, ImportError) as error:
            # ImportError: the database's driver is not installed.
            raise WorldError(f"MLflow at {self.shown_uri} refused: {first_line(error)}") from error

    @property
    def shown_uri(self) -> str:
        """The tracking URI without a password."""
        return _redact(self.uri)

    @_one_line_errors
    def experiment(self, name: str, *, create: bool) -> str:
        """The id of an experiment.

        Raises:
            UserError: It does not exist and ``create`` is false.
        """
        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is not None:
            raise UserError(f"experiment {name!r} was deleted; restore it in MLflow or give another --experiment")
        if not create:
            known = ", ".join(sorted(entry.name for entry in self.client.search_experiments())) or "none"
            raise UserError(f"no experiment {name!r} in {self.shown_uri}; known: {known}")
        # A local store would put artifacts into ./mlartifacts of whatever the working directory is.
        local = None if self.uri.startswith("http") else _file_uri(storage.join(storage.home(), "mlartifacts", name))
        return self.client.create_experiment(name, artifact_location=local, tags=_EXPERIMENT_TAGS)

    @_one_line_errors
    def start_run(
        self,
        name: str,
        *,
        experiment: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        data_set: DataSetInput | None = None,
        parent_run_id: str | None = None,
    ) -> TrackedRun:
        """Creates the run of this name, or continues it.

        Raises:
            UserError: A live driver is writing the run, or the name belongs to another experiment.
        """
        experiment_id = self.experiment(experiment, create=True)
        run = self.find_run(name)
        if run is None:
            run = self._create_run(name, experiment_id, params, tags, data_set, parent_run_id)
        else:
            if run.info.experiment_id != experiment_id:
                other = self.client.get_experiment(run.info.experiment_id).name
                raise UserError(f"--name {name!r} is a run of experiment {other!r}; choose another name")
            _refuse_if_live(self.client, run)
            self.client.update_run(run.info.run_id, status="RUNNING")
        tracked = TrackedRun(self, run)
        tracked.set_tags({_OWNER: _owner(), **tags})
        tracked.heartbeat()
        return tracked

    @_one_line_errors
    def find_run(self, name: str) -> "Run | None":
        """The newest run of this name, in any experiment."""
        experiments = [entry.experiment_id for entry in self.client.search_experiments()]
        quoted = name.replace("'", "''")
        runs = self.client.search_runs(experiments, f"attributes.run_name = '{quoted}'", max_results=1)
        return runs[0] if runs else None

    @_one_line_errors
    def end_children(self, parent_run_id: str, experiment_id: str) -> None:
        """Marks runs of a sweep that still say RUNNING as KILLED: their processes ended with the sweep."""
        query = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([experiment_id], query):
            self.client.set_terminated(run.info.run_id, "KILLED")

    @_one_line_errors
    def run_names(self, limit: int = 20) -> list[str]:
        """Names of the newest runs."""
        experiments = [entry.experiment_id for entry in self.client.search_experiments()]
        return [run.info.run_name for run in self.client.search_runs(experiments, max_results=limit)]

    @_one_line_errors
    def params(self, run_id: str) -> dict[str, str]:
        """Params of a run."""
        return dict(self.client.get_run(run_id).data.params)

    @_one_line_errors
    def checkpoints(self, experiment_id: str, *, run_id: str | None = None) -> list[Checkpoint]:
        """Published checkpoints of an experiment or of one run, newest first. Unfinished uploads are left out."""
        wanted = f"source_run_id = '{run_id}'" if run_id else None
        found: list[LoggedModel] = []
        token = None
        while True:
            page = self.client.search_logged_models([experiment_id], filter_string=wanted, page_token=token)
            found += page
            token = page.token
            if not token:
                break
        ready = [m for m in found if m.model_type == _MODEL_TYPE and str(m.status) == "READY" and _STEP in m.tags]
        ready.sort(key=lambda model: (model.creation_timestamp, int(model.tags[_STEP])), reverse=True)
        return [_checkpoint(model) for model in ready]

    def download(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """Copies a checkpoint's files into a folder and returns where they lie.

        Raises:
            WorldError: The artifacts are gone or the store does not answer.
        """
        from mlflow.artifacts import download_artifacts

        try:
            return Path(
                download_artifacts(artifact_uri=checkpoint.artifact_uri, dst_path=str(folder), tracking_uri=self.uri)
            )
        except Exception as error:
            # MLflow lets through whatever its store raises: botocore, requests, OSError, its own exception.
            raise WorldError(
                f"cannot read checkpoint {checkpoint.run_name} step {checkpoint.step} at {checkpoint.artifact_uri}: "
                f"{first_line(error)}"
            ) from error

    @_one_line_errors
    def log_result(
        self, checkpoint: Checkpoint, *, identity: str, protocol: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Stores an evaluation's metrics and its protocol, then marks the checkpoint: the mark comes last.

        A killed evaluator may leave a metric without the mark; the next one measures again and gets the same value.
        """
        for key, value in metrics.items():
            self.client.log_metric(checkpoint.run_id, key, value, step=checkpoint.step, model_id=checkpoint.model_id)
        record = json.dumps({"protocol": protocol, "metrics": metrics}, sort_keys=True)
        self.client.set_logged_model_tags(checkpoint.model_id, {_protocol_tag(identity): record, _EVAL_STATUS: "done"})

    def ui_command(self, run_id: str, experiment_id: str) -> list[str]:
        """What a person types to see a run: lines of a command (if a server must be started) and the address."""
        page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
        if self.uri.startswith("http"):
            return [f"{self.shown_uri.rstrip('/')}{page}"]
        program = Path(sys.executable).with_name("mlflow")
        shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
        return [
            f"{shown} server --backend-store-uri {self.shown_uri} --host 127.0.0.1 --port 5000 --workers 1",
            f"http://127.0.0.1:5000{page}",
        ]

    def _create_run(
        self,
        name: str,
        experiment_id: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        data_set: DataSetInput | None,
        parent_run_id: str | None,
    ) -> "Run":
        from mlflow.entities import Param

        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        run = self.client.create_run(experiment_id, run_name=name, tags={**tags, **parent})
        entries = [Param(key, _param_text(value)) for key, value in params.items()]
        self.client.log_batch(run.info.run_id, params=entries)
        if data_set is not None:
            self.client.log_inputs(run.info.run_id, [_dataset_input(data_set)])
        return self.client.get_run(run.info.run_id)


def _tracking_uri() -> str:
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    root = storage.home()
    if storage.is_remote(root):
        raise UserError(f"DDPM_HOME={root} is remote: set MLFLOW_TRACKING_URI to an MLflow server")
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorldError(f"cannot create DDPM_HOME={root}: {error.strerror}") from error
    return f"sqlite:///{root}/mlflow.db"


def _check_reachable(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        detail = type(error).__name__ if error.response is None else f"HTTP {error.response.status_code}"
        raise WorldError(
            f"MLflow at {_redact(uri)} does not answer ({detail}); start it, or unset MLFLOW_TRACKING_URI "
            "to use the local store"
        ) from None


def _redact(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))


def _file_uri(location: str) -> str:
    return location if storage.is_remote(location) else Path(location).as_uri()


def _owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _refuse_if_live(client: Any, run: "Run") -> None:
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


def _param_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:6000]  # MLflow's limit


def _protocol_tag(identity: str) -> str:
    return f"protocol.{identity}"


def _checkpoint(model: "LoggedModel") -> Checkpoint:
    return Checkpoint(
        model_id=model.model_id,
        run_id=model.source_run_id or "",
        run_name=model.tags[_RUN_NAME],
        step=int(model.tags[_STEP]),
        artifact_uri=model.artifact_location,
        tags=dict(model.tags),
    )


def _dataset_input(data_set: DataSetInput) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(
        name=data_set.name,
        digest=data_set.digest[:36],  # MLflow's limit
        source_type="s3" if storage.is_remote(data_set.location) else "local",
        source=json.dumps({"uri": data_set.location}),
        profile=json.dumps(dict(data_set.profile)),
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", "training")])
