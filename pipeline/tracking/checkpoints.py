"""Published checkpoints: READY LoggedModels with the EMA weights and ``meta.json``, and the results on them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = ["EVAL_STATUS", "MODEL_TYPE", "RUN_NAME", "STEP", "Checkpoint", "checkpoint_of", "protocol_tag", "published"]

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
    params: Mapping[str, str] = field(default_factory=dict)
    """Written once each: claims of evaluators."""

    def has_result(self, identity: str) -> bool:
        """Whether a result of the protocol with this identity is already there."""
        return protocol_tag(identity) in self.tags

    def result(self, identity: str) -> dict[str, Any]:
        """The stored result: ``metrics`` and ``protocol``."""
        record: dict[str, Any] = json.loads(self.tags[protocol_tag(identity)])
        return record

    def results(self) -> dict[str, dict[str, Any]]:
        """All stored results by identity; what other programs put under such a tag is left out."""
        found = {}
        for tag, text in self.tags.items():
            if not tag.startswith(prefix := protocol_tag("")):
                continue
            try:
                record = json.loads(text)
            except ValueError:
                continue
            if isinstance(record, dict) and {"protocol", "metrics"} <= record.keys():
                found[tag.removeprefix(prefix)] = record
        return found


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
    ready = [
        m
        for m in found
        if m.model_type == MODEL_TYPE and str(m.status) == "READY" and {STEP, RUN_NAME} <= m.tags.keys()
    ]
    ready.sort(key=lambda model: (model.creation_timestamp, int(model.tags[STEP])), reverse=True)
    return [checkpoint_of(model) for model in ready]


def protocol_tag(identity: str) -> str:
    return f"protocol.{identity}"


def checkpoint_of(model: "LoggedModel") -> Checkpoint:
    """What a LoggedModel of ours says."""
    return Checkpoint(
        model_id=model.model_id,
        run_id=model.source_run_id or "",
        run_name=model.tags[RUN_NAME],
        step=int(model.tags[STEP]),
        artifact_uri=model.artifact_location,
        tags=dict(model.tags),
        params={key: str(value) for key, value in (model.params or {}).items()},
    )
