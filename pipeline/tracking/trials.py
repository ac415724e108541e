"""What a sweep writes on the run of a trial once that has ended: how it ended, what it cost, further results."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.tracking import ownership
from pipeline.tracking.runs import Status

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["last_step", "note"]


def last_step(client: "MlflowClient", run_id: str) -> int:
    """The last step whose loss is logged; 0 if none is."""
    return max((metric.step for metric in client.get_metric_history(run_id, "train/loss")), default=0)


def note(
    client: "MlflowClient",
    run_id: str,
    *,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    step: int,
    files: Mapping[str, str],
    status: Status | None,
) -> None:
    """Writes on a trial's run; the same note again changes nothing but metrics of another value.

    Args:
        client: Connected to MLflow.
        run_id: The trial's run; its own driver has let go of it or is dead.
        tags: Tags to set.
        metrics: Values at ``step``; one that is there already is not logged again.
        step: The step that the trial reached.
        files: Texts by file name, logged as artifacts.
        status: How the run ended, if that is not what its own driver has said.
    """
    from mlflow.entities import Metric, RunTag

    run = client.get_run(run_id)
    now = int(time.time() * 1000)
    new = [Metric(key, value, now, step) for key, value in metrics.items() if run.data.metrics.get(key) != value]
    client.log_batch(run_id, metrics=new, tags=[RunTag(key, value) for key, value in tags.items()])
    for name, text in files.items():
        client.log_text(run_id, text, name)
    if status is None or run.info.status == status:
        return
    if run.info.status == "RUNNING":
        ownership.close(client, run, "its trial ended", is_final=True)
    client.set_terminated(run_id, status)
