"""Runs as MLflow has recorded them, to be read and never written: what reports are made of."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.tracking.ownership import without_claims

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["RecordedRun", "artifact", "children", "history", "recorded"]


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run that somebody wrote."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """The last value of each."""
    artifact_uri: str


def recorded(run: "Run") -> RecordedRun:
    """What MLflow's own entity says."""
    return RecordedRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        experiment_id=run.info.experiment_id,
        status=run.info.status,
        params=without_claims(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        artifact_uri=run.info.artifact_uri,
    )


def children(client: "MlflowClient", parent: RecordedRun) -> list[RecordedRun]:
    """The runs whose parent a run is, the oldest first."""
    wanted = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([parent.experiment_id], wanted, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return [recorded(run) for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_name))]


def history(client: "MlflowClient", run_id: str, key: str) -> dict[int, float]:
    """A metric by step; of a step that was logged twice, the later value."""
    logged = sorted(client.get_metric_history(run_id, key), key=lambda metric: (metric.step, metric.timestamp))
    return {metric.step: metric.value for metric in logged}


def artifact(client: "MlflowClient", run_id: str, path: str) -> bytes | None:
    """The bytes of a run's artifact in its top folder; None if the run has none of this name."""
    if path not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory(prefix="ddpm-artifact-") as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()
