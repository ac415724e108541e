"""Whether a store takes what jobs write: a run, a metric and an artifact, which are deleted again."""

import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import WorldError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["probe"]

_FILE = "probe.txt"


def probe(client: "MlflowClient", experiment_id: str, shown_uri: str) -> None:
    """Writes a run, reads it again and deletes it.

    Raises:
        WorldError: The store does not take it, or gives back something else.
    """
    run_id = client.create_run(experiment_id, run_name="probe").info.run_id
    try:
        client.log_metric(run_id, "probe", 1.0)
        if client.get_run(run_id).data.metrics != {"probe": 1.0}:
            raise WorldError(f"MLflow at {shown_uri} gives back other values than it took")
        text = uuid.uuid4().hex
        try:
            back = _through_the_artifacts(client, run_id, text)
        except Exception as error:  # of whatever store the artifacts lie in; a server answers without reaching its own
            raise WorldError(f"MLflow at {shown_uri} takes runs but no artifacts: {first_line(error)}") from error
        if back != text:
            raise WorldError(f"MLflow at {shown_uri} gives back another artifact than it took")
    finally:
        client.delete_run(run_id)


def _through_the_artifacts(client: "MlflowClient", run_id: str, text: str) -> str:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client.log_text(run_id, text, _FILE)
    with tempfile.TemporaryDirectory(prefix="ddpm-probe-") as folder:
        back = Path(client.download_artifacts(run_id, _FILE, folder)).read_text()
    get_artifact_repository(client.get_run(run_id).info.artifact_uri).delete_artifacts(_FILE)  # type: ignore[no-untyped-call]
    return back
