"""A connection to one MLflow store."""

import contextlib
import fcntl
import getpass
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from pipeline import storage
from pipeline.config import as_params
from pipeline.errors import UserError, WorldError, first_line
from pipeline.tracking import leases, ownership, probing, recorded, registry, results, trials
from pipeline.tracking.checkpoints import Checkpoint, checkpoint_of, published
from pipeline.tracking.interrupts import uninterrupted
from pipeline.tracking.outages import is_outage, patient_requests, set_defaults
from pipeline.tracking.ownership import Claim
from pipeline.tracking.recorded import RecordedRun
from pipeline.tracking.runs import DataSetInput, Status, TrackedRun, dataset_input, one_line_errors

set_defaults()
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # jobs name the page themselves
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# Artifacts come through the server. MLflow would rather have them fetched from the address by which the server knows
# its S3 store, often one that only the server's own network has, and tries that for minutes.
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")

if TYPE_CHECKING:
    import numpy as np
    from mlflow.entities import Run

__all__ = ["Tracker"]

logger = logging.getLogger(__name__)

_SETTLE_SECONDS = 0.3
"""How long a new run waits for others of its name that are created at the same moment."""
_MAX_STARTS = 8
_HEALTH_SECONDS = 20.0
"""How long a server may take to say that it is there: a busy one takes seconds."""
_PROBE_EXPERIMENT = "ddpm-doctor"
_PARAM_LIMIT = 6000  # MLflow's, in characters
# Without it the UI guesses from the contents and may show the pages for language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class Tracker:
    """A connection to one MLflow store."""

    def __init__(self, *, patience_seconds: float = 0.0) -> None:
        """Connects to ``MLFLOW_TRACKING_URI``, else to ``mlflow.db`` under ``$DDPM_HOME``, created if missing.

        Args:
            patience_seconds: How long to wait for a server that does not answer.

        Raises:
            UnreachableError: The server does not answer.
            WorldError: The store cannot be opened.
            UserError: ``$DDPM_HOME`` is remote and no tracking URI is given.
        """
        self.uri = _tracking_uri()
        if self.uri.startswith("http"):
            storage.patiently(self.shown_uri, patience_seconds, lambda: _check_reachable(self.uri), server="MLflow")
        import mlflow
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            mlflow.set_tracking_uri(self.uri)
            with _one_at_a_time(self.uri), patient_requests():
                client = MlflowClient(self.uri)
                self.client: MlflowClient = client if self.uri.startswith("http") else uninterrupted(client)
                self.client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
            # ImportError: the database's driver is not installed.
            kind = storage.UnreachableError if is_outage(error) else WorldError
            raise kind(f"MLflow at {self.shown_uri} refused: {first_line(error)}") from error

    @property
    def shown_uri(self) -> str:
        """The tracking URI without a password."""
        return _redact(self.uri)

    @one_line_errors
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
        return self._create_experiment(name)

    @one_line_errors
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
        """Creates the run of this name, or continues it; of several that do so at the same moment one goes on.

        Raises:
            UserError: A live driver is writing the run, or the name belongs to another experiment.
        """
        with patient_requests():
            experiment_id = self.experiment(experiment, create=True)
            parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
            tracked = self._claim_run(name, experiment_id, {**tags, **parent})
            try:
                if tracked.is_new:
                    self._describe(tracked, params, data_set)
                tracked.own()
                tracked.set_tags(tags)
            except BaseException:
                with contextlib.suppress(Exception):
                    tracked.finish("FAILED")
                raise
        self.close_abandoned(experiment)
        return tracked

    @one_line_errors
    def find_run(self, name: str) -> "Run | None":
        """The run of this name, in any experiment; the newest, should others have been made by hand."""
        runs = self._runs_called(name)
        return max(runs, key=_precedence) if runs else None

    @one_line_errors
    def is_held(self, name: str) -> bool:
        """Whether another process of this machine that lives writes the run of this name."""
        run = self.find_run(name)
        holder = ownership.holder_of(run) if run is not None else None
        return holder is not None and not holder.is_own() and holder.process_lives() is True

    def close_abandoned(self, experiment: str) -> None:
        """Marks runs of an experiment KILLED that say RUNNING, but whose driver is gone; never those of other programs.

        A courtesy: MLflow refusing it stops nothing.
        """
        query = f"attributes.status = 'RUNNING' and tags.`{ownership.HEARTBEAT}` != ''"
        try:
            found = self.client.get_experiment_by_name(experiment)
            runs = self.client.search_runs([found.experiment_id], query) if found else []
            for name in ownership.close_abandoned(self.client, runs):
                logger.info("run %s is marked KILLED: its driver is gone", name)
        except Exception as error:  # MLflow lets through whatever its store raises.
            logger.debug("abandoned runs could not be marked: %s", first_line(error))

    @one_line_errors
    def end_children(self, parent_run_id: str, experiment_id: str) -> None:
        """Marks runs of a sweep that still say RUNNING as KILLED; a driver that still lives ends as well."""
        query = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([experiment_id], query):
            ownership.close(self.client, run, "its sweep ended", is_final=True)

    @one_line_errors
    def note_trial(
        self,
        run_id: str,
        *,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
        step: int,
        files: Mapping[str, str],
        status: Status | None = None,
    ) -> None:
        """Writes how a trial of a sweep ended on its run; see ``trials.note``."""
        trials.note(self.client, run_id, tags=tags, metrics=metrics, step=step, files=files, status=status)

    @one_line_errors
    def last_step(self, run_id: str) -> int:
        """The last step that a run has logged; see ``trials.last_step``."""
        return trials.last_step(self.client, run_id)

    @one_line_errors
    def run_names(self, limit: int = 20) -> list[str]:
        """Names of the newest runs."""
        experiments = [entry.experiment_id for entry in self.client.search_experiments()]
        return [run.info.run_name for run in self.client.search_runs(experiments, max_results=limit)]

    @one_line_errors
    def params(self, run_id: str) -> dict[str, str]:
        """Params of a run."""
        return ownership.without_claims(self.client.get_run(run_id).data.params)

    @one_line_errors
    def recorded(self, run_id: str) -> RecordedRun:
        """A run as it stands."""
        return recorded.recorded(self.client.get_run(run_id))

    @one_line_errors
    def children(self, parent: RecordedRun) -> list[RecordedRun]:
        """The runs of a sweep as they stand, the oldest first."""
        return recorded.children(self.client, parent)

    @one_line_errors
    def history(self, run_id: str, key: str) -> dict[int, float]:
        """A metric of a run by step."""
        return recorded.history(self.client, run_id, key)

    @one_line_errors
    def artifact(self, run_id: str, path: str) -> bytes | None:
        """The bytes of a run's artifact in its top folder; None if there is none."""
        return recorded.artifact(self.client, run_id, path)

    def artifact_location(self, run: RecordedRun, path: str) -> str:
        """Where an artifact of a run can be seen: an address of the server, or where it lies."""
        if self.uri.startswith("http"):
            return f"{self.shown_uri.rstrip('/')}/get-artifact?path={quote(path)}&run_uuid={run.run_id}"
        return storage.join(run.artifact_uri, path)

    @one_line_errors
    def checkpoints(self, experiment_id: str, *, run_id: str | None = None) -> list[Checkpoint]:
        """Published checkpoints of an experiment or of one run, newest first. Unfinished uploads are left out."""
        return published(self.client, experiment_id, run_id)

    def download(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """Copies a checkpoint's files into a folder and returns where they lie.

        Raises:
            UnreachableError: The store of the artifacts does not answer.
            WorldError: The artifacts are gone.
        """
        from mlflow.artifacts import download_artifacts

        try:
            return Path(
                download_artifacts(artifact_uri=checkpoint.artifact_uri, dst_path=str(folder), tracking_uri=self.uri)
            )
        except Exception as error:
            # MLflow lets through whatever its store raises: botocore, requests, OSError, its own exception.
            raise (storage.UnreachableError if is_outage(error) else WorldError)(
                f"cannot read checkpoint {checkpoint.run_name} step {checkpoint.step} at {checkpoint.artifact_uri}: "
                f"{first_line(error)}"
            ) from error

    @one_line_errors
    def refresh(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint as MLflow has it now."""
        return checkpoint_of(self.client.get_logged_model(checkpoint.model_id))

    @one_line_errors
    def take_lease(self, checkpoint: Checkpoint, identity: str, stands: leases.Standing) -> leases.Lease | None:
        """Takes the lease on a checkpoint that nobody holds; None if another evaluator was quicker."""
        return leases.take(self.client, checkpoint, identity, stands)

    @one_line_errors
    def log_result(
        self,
        checkpoint: Checkpoint,
        *,
        identity: str,
        protocol: Mapping[str, Any],
        metrics: Mapping[str, float],
        logged_under: str = "",
    ) -> None:
        """Stores an evaluation's metrics and its protocol; see ``results.log_result``."""
        results.log_result(
            self.client,
            checkpoint,
            identity=identity,
            protocol=protocol,
            metrics=metrics,
            logged_under=logged_under,
        )

    @one_line_errors
    def has_sheet(self, checkpoint: Checkpoint) -> bool:
        """Whether the run has a sample sheet of this step."""
        return checkpoint.step in results.sheet_steps(self.client, checkpoint.run_id)

    @one_line_errors
    def log_sheet(self, checkpoint: Checkpoint, pixels: "np.ndarray") -> None:
        """Logs a sample sheet, uint8 [H, W, C], of a checkpoint."""
        results.log_sheet(self.client, checkpoint, pixels)

    @one_line_errors
    def log_terms(self, checkpoint: Checkpoint, table: str, *, suffix: str) -> None:
        """Logs the terms of a checkpoint's variational bound, a CSV file."""
        path = f"likelihood/step-{checkpoint.step:08d}{suffix}.csv"
        self.client.log_text(checkpoint.run_id, table, path)

    @one_line_errors
    def log_files(self, checkpoint: Checkpoint, folder: Path, path: str) -> list[str]:
        """Logs the files of a folder as artifacts under ``path`` of a checkpoint's run; returns how to see them."""
        self.client.log_artifacts(checkpoint.run_id, str(folder), path)
        return self.ui_command(checkpoint.run_id, self.client.get_run(checkpoint.run_id).info.experiment_id)

    @one_line_errors
    def last_sheet(self, run_id: str) -> tuple[int, bytes] | None:
        """Step and PNG bytes of a run's last sample sheet."""
        steps = results.sheet_steps(self.client, run_id)
        return (last := max(steps), results.sheet(self.client, run_id, steps[last])) if steps else None

    @one_line_errors
    def experiment_of(self, run: str) -> str | None:
        """The name of the experiment that a run is in."""
        found = self.find_run(run)
        return None if found is None else str(self.client.get_experiment(found.info.experiment_id).name)

    @one_line_errors
    def champion(self, name: str) -> str | None:
        """The id of the model that has the alias ``champion`` of a registered model."""
        return registry.champion(self.client, name)

    @one_line_errors
    def crown(self, name: str, checkpoint: Checkpoint, tags: Mapping[str, str]) -> int:
        """Gives a checkpoint the alias ``champion``; returns the number of its version."""
        return registry.crown(self.client, name, checkpoint, tags)

    @one_line_errors
    def probe(self) -> None:
        """Writes a run with an artifact, reads both again and deletes them, in an experiment of its own.

        Raises:
            WorldError: MLflow does not take it, or gives back something else.
        """
        probing.probe(self.client, self.experiment(_PROBE_EXPERIMENT, create=True), self.shown_uri)

    def clock_offset_seconds(self) -> float | None:
        """Seconds by which the server is ahead of this machine, to about a second; None for a local store."""
        if not self.uri.startswith("http"):
            return None
        import requests

        date = requests.get(f"{self.uri.rstrip('/')}/health", timeout=5).headers.get("Date")
        return parsedate_to_datetime(date).timestamp() - time.time() if date else None

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

    def _create_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        # A local store would put artifacts into ./mlartifacts of whatever the working directory is.
        local = None if self.uri.startswith("http") else _file_uri(storage.join(storage.home(), "mlartifacts", name))
        try:
            return self.client.create_experiment(name, artifact_location=local, tags=_EXPERIMENT_TAGS)
        except MlflowException:
            created = self.client.get_experiment_by_name(name)  # by another job, a moment ago
            if created is None:
                raise
            return str(created.experiment_id)

    def _claim_run(self, name: str, experiment_id: str, tags: Mapping[str, str]) -> TrackedRun:
        for _ in range(_MAX_STARTS):
            run = self.find_run(name)
            if run is None:
                if (tracked := self._create_run(name, experiment_id, tags)) is not None:
                    return tracked
                continue
            if run.info.experiment_id != experiment_id:
                other = self.client.get_experiment(run.info.experiment_id).name
                raise UserError(f"--name {name!r} is a run of experiment {other!r}; choose another name")
            return TrackedRun(self.client, run, ownership.claim(self.client, run))
        raise WorldError(
            f"run {name!r} is being started by several drivers at the same moment; start one of them again"
        )

    def _create_run(self, name: str, experiment_id: str, tags: Mapping[str, str]) -> TrackedRun | None:
        """Creates a run and claims it, unless another one of its name is being created; then nothing is left behind.

        Names are not unique in MLflow. Safe without any clock: everyone writes its claim before it looks for those of
        others, so of two that claimed at least the later one sees both and withdraws. That not both do is likely, not
        certain (the settling time, and a pause of random length before the next try).
        """
        creator = Claim(number=0)
        marks = {ownership.CREATOR: creator.to_json(), ownership.HEARTBEAT: str(int(creator.time))}
        everything = {**_source_tags(), **tags, **marks}
        run_id = self.client.create_run(experiment_id, run_name=name, tags=everything).info.run_id
        time.sleep(_SETTLE_SECONDS)
        first = min(self._runs_called(name), key=lambda run: (not _is_claimed(run), run.info.run_id))
        if first.info.run_id == run_id and not _is_claimed(first):
            claim = Claim(number=1)
            if not ownership.try_claim(self.client, run_id, claim):
                return None
            if not any(_is_claimed(run) for run in self._runs_called(name) if run.info.run_id != run_id):
                return TrackedRun(self.client, self.client.get_run(run_id), claim)
        self.client.delete_run(run_id)
        time.sleep(random.uniform(0, 3 * _SETTLE_SECONDS))
        return None

    def _describe(self, tracked: TrackedRun, params: Mapping[str, Any], data_set: DataSetInput | None) -> None:
        from mlflow.entities import Param

        entries = [Param(key, text[:_PARAM_LIMIT]) for key, text in as_params(dict(params)).items()]
        self.client.log_batch(tracked.run_id, params=entries)
        tracked.params = {entry.key: entry.value for entry in entries}
        if data_set is not None:
            self.client.log_inputs(tracked.run_id, [dataset_input(data_set)])

    def _runs_called(self, name: str) -> "list[Run]":
        experiments = [entry.experiment_id for entry in self.client.search_experiments()]
        quoted = name.replace("'", "''")
        return list(self.client.search_runs(experiments, f"attributes.run_name = '{quoted}'", max_results=100))


def _source_tags() -> dict[str, str]:
    """What MLflow's own pages show as source and creator."""
    program = Path(sys.argv[0])
    # A sweep's trials are processes that Ray started.
    name = (
        "jobs/tune.py" if program.name == "default_worker.py" else f"{program.parent.name}/{program.name}".lstrip("/")
    )
    tags = {"mlflow.source.name": name, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _is_claimed(run: "Run") -> bool:
    latest = ownership.latest_claim(run)
    return latest is not None and latest.number > 0


def _precedence(run: "Run") -> tuple[bool, int]:
    """A run that somebody claimed goes before one that a driver created and did not live to claim."""
    return _is_claimed(run), run.info.start_time


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Several processes that create one sqlite store at the same time corrupt it: the first one creates it."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or not Path(path).parent.is_dir():
        yield
        return
    with Path(f"{path}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
        requests.get(f"{uri.rstrip('/')}/health", timeout=(5, _HEALTH_SECONDS)).raise_for_status()
    except requests.RequestException as error:
        detail = type(error).__name__ if error.response is None else f"HTTP {error.response.status_code}"
        raise storage.UnreachableError(
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
