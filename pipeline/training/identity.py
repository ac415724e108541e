"""A run is its name: the MLflow run of that name is continued, or refused if it was another run."""

from collections.abc import Mapping, Sequence

from pipeline import storage
from pipeline.config import to_flat
from pipeline.errors import UserError
from pipeline.provenance import code_record
from pipeline.tracking import Checkpoint, DataSetInput, TrackedRun, Tracker
from pipeline.training.committed import SNAPSHOT, runs_root
from pipeline.training.task import TrainingTask, differences

__all__ = ["open_run"]


def open_run(task: TrainingTask, tracker: Tracker, parent_run_id: str | None, tags: Mapping[str, str]) -> TrackedRun:
    config, manifest = task.config, task.manifest
    assert config.name is not None
    existing = tracker.find_run(config.name)
    if existing is not None:
        _refuse_another_run(task, existing.data.params, existing.data.tags)
        _refuse_lost_checkpoints(
            config.name, tracker.checkpoints(existing.info.experiment_id, run_id=existing.info.run_id)
        )
    code = code_record()
    commit = {"mlflow.source.git.commit": code["git_commit"]} if "git_commit" in code else {}
    return tracker.start_run(
        config.name,
        experiment=config.experiment,
        params=to_flat(config),
        tags={
            **commit,
            **{f"code.{key}": value for key, value in code.items()},
            "data.digest": manifest.digest,
            **tags,
        },
        data_set=DataSetInput(
            name=config.data.data.rstrip("/").rpartition("/")[2],
            location=task.location,
            digest=manifest.digest,
            profile={"num_images": manifest.num_images, "num_shards": len(manifest.shards)},
        ),
        parent_run_id=parent_run_id,
    )


def _refuse_another_run(task: TrainingTask, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """A run is continued only as what it was; MLflow's params and tags say what it was."""
    name = task.config.name
    if changed := differences(task.config, params):
        raise UserError(f"run {name!r} exists with another config: {'; '.join(changed)}; choose another --name")
    digest = tags.get("data.digest", task.manifest.digest)
    if digest != task.manifest.digest:
        raise UserError(
            f"run {name!r} was trained on a data set with digest {digest[:12]}, {task.location} has "
            f"{task.manifest.digest[:12]}; give the old --data, or choose another --name"
        )


def _refuse_lost_checkpoints(name: str, published: Sequence[Checkpoint]) -> None:
    """MLflow knows published checkpoints, storage has none to go on from: starting at 0 would mix two curves."""
    folder = storage.join(runs_root(), name)
    if published and not storage.exists(storage.join(folder, SNAPSHOT)):
        raise UserError(
            f"MLflow has checkpoints of run {name!r} up to step {max(entry.step for entry in published)}, but {folder} "
            "holds none to go on from; set DDPM_HOME to where they lie, or choose another --name"
        )
