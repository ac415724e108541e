"""What an evaluation leaves on a checkpoint and on the run that trained it: metrics, the protocol, a sample sheet."""

import json
import re
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.tracking.checkpoints import EVAL_STATUS, Checkpoint, protocol_tag

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient

__all__ = ["log_result", "log_sheet", "sheet", "sheet_steps"]

_SHEETS = "samples"
"""Key of the sample sheets; training logs under it as well."""


def log_result(
    client: "MlflowClient",
    checkpoint: Checkpoint,
    *,
    identity: str,
    protocol: Mapping[str, Any],
    metrics: Mapping[str, float],
    logged_under: str = "",
) -> None:
    """Stores an evaluation: its metrics together, in one transaction, then the mark that says they are there.

    An evaluator that was killed between the two leaves metrics without the mark. The next one finds the same values at
    the same step and only sets the mark.

    Args:
        client: Connected to MLflow.
        checkpoint: What was measured.
        identity: Of the protocol.
        protocol: Stored with the values.
        metrics: Values by name.
        logged_under: Added to the names on the run, which keeps results of several protocols apart; the record on the
            checkpoint has the names as they are.
    """
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    new = [
        Metric(key, value, now, checkpoint.step, model_id=checkpoint.model_id)
        for key, value in ((name + logged_under, value) for name, value in metrics.items())
        if not _is_logged(client, checkpoint, key, value)
    ]
    if new:
        client.log_batch(checkpoint.run_id, metrics=new)
    record = json.dumps({"protocol": protocol, "metrics": metrics}, sort_keys=True)
    client.set_logged_model_tags(checkpoint.model_id, {protocol_tag(identity): record, EVAL_STATUS: "done"})


def _is_logged(client: "MlflowClient", checkpoint: Checkpoint, key: str, value: float) -> bool:
    history = client.get_metric_history(checkpoint.run_id, key)
    return any((metric.step, metric.value) == (checkpoint.step, value) for metric in history)


def log_sheet(client: "MlflowClient", checkpoint: Checkpoint, pixels: "np.ndarray") -> None:
    """Logs a sample sheet, uint8 [H, W, C], where training logs its own."""
    client.log_image(checkpoint.run_id, pixels, key=_SHEETS, step=checkpoint.step, synchronous=True)


def sheet_steps(client: "MlflowClient", run_id: str) -> dict[int, str]:
    """The steps of a run that have a sample sheet, and its artifact's path."""
    pattern = re.compile(rf"images/{_SHEETS}[+%]step[+%](\d+)[+%].*\.png")
    found = (pattern.fullmatch(file.path) for file in client.list_artifacts(run_id, "images"))
    return {int(match[1]): match[0] for match in found if match}


def sheet(client: "MlflowClient", run_id: str, path: str) -> bytes:
    """A sample sheet as the bytes of a PNG file."""
    with (
        tempfile.TemporaryDirectory(prefix="ddpm-sheet-") as folder,
        open(client.download_artifacts(run_id, path, folder), "rb") as file,
    ):
        return file.read()
