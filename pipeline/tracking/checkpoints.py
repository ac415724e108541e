"""Published checkpoints: READY LoggedModels with the EMA weights and ``meta.json``, and the results on them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = ["EVAL_STATUS", "MODEL_TYPE", "RUN_NAME", "STEP", "Checkpoint", "protocol_tag", "published"]

RUN_NAME, STEP, EVAL_STATUS = "run_name", "step", "eval_status"
MODEL_TYPE = "ddpm-checkpoint"


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
        return protocol_tag(identity) in self.tags

    def result(self, identity: str) -> dict[str, Any]:
        """The stored result: ``metrics`` and ``protocol``."""
        record: dict[str, Any] = json.loads(self.tags[protocol_tag(identity)])
        return record


def published(client: "MlflowClient", experiment_id: str, run_id: str | None = None) -> list[Checkpoint]:
    """Published checkpoints of an experiment or of one run, newest first. Unfinished uploads are left out."""
    wanted = f"source_run_id = '{run_id}'" if run_id else None
    found: list[LoggedModel] = []
    token = None
    while True:
        page = client.search_logged_models([experiment_id], filter_string=wanted, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    ready = [m for m in found if m.model_type == MODEL_TYPE and str(m.status) == "READY" and STEP in m.tags]
    ready.sort(key=lambda model: (model.creation_timestamp, int(model.tags[STEP])), reverse=True)
    return [_checkpoint(model) for model in ready]


def protocol_tag(identity: str) -> str:
    return f"protocol.{identity}"


def _checkpoint(model: "LoggedModel") -> Checkpoint:
    return Checkpoint(
        model_id=model.model_id,
        run_id=model.source_run_id or "",
        run_name=model.tags[RUN_NAME],
        step=int(model.tags[STEP]),
        artifact_uri=model.artifact_location,
        tags=dict(model.tags),
    )
