"""The model registry: a published checkpoint becomes a version that ``mlflow.pyfunc`` can load.

What makes it loadable is one more file beside weights and ``meta.json``, an ``MLmodel`` that names a module of this
package as its loader. Nothing is pickled: whoever loads the model needs the package and runs its code alone.
"""

import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.tracking.checkpoints import Checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CHAMPION", "champion", "crown"]

CHAMPION = "champion"
_LOADER = "pipeline.serving"
_SCHEME = "models:/"


def champion(client: "MlflowClient", name: str) -> str | None:
    """The id of the model that has the alias; None if none has it, or its version is not of our making."""
    from mlflow.exceptions import MlflowException

    try:
        # Not by the alias: of a model that does not exist, a server with logins answers that it is forbidden.
        number = client.get_registered_model(name).aliases.get(CHAMPION)
        version = None if number is None else client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if version is None else _model_id(str(version.source))


def crown(client: "MlflowClient", name: str, checkpoint: Checkpoint, tags: Mapping[str, str]) -> int:
    """Gives a checkpoint the alias; returns the number of its version, which is made unless it exists."""
    _make_loadable(client, checkpoint)
    version = _version_of(client, name, checkpoint) or _register(client, name, checkpoint)
    facts = {"run": checkpoint.run_name, "step": str(checkpoint.step), **tags}
    for key, value in facts.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, CHAMPION, version)
    return int(version)


def _register(client: "MlflowClient", name: str, checkpoint: Checkpoint) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{_SCHEME}{checkpoint.model_id}"
    made = client.create_model_version(name, source, run_id=checkpoint.run_id, model_id=checkpoint.model_id)
    return str(made.version)


def _version_of(client: "MlflowClient", name: str, checkpoint: Checkpoint) -> str | None:
    quoted = name.replace("'", "''")
    versions = client.search_model_versions(f"name = '{quoted}'")
    return next((str(v.version) for v in versions if _model_id(str(v.source)) == checkpoint.model_id), None)


def _model_id(source: str) -> str | None:
    """MLflow keeps the source as it was given, or as the path of the model's artifacts."""
    if source.startswith(_SCHEME):
        return source.removeprefix(_SCHEME)
    words = source.rstrip("/").split("/")
    return next((word for word in reversed(words) if word.startswith("m-")), None)


def _make_loadable(client: "MlflowClient", checkpoint: Checkpoint) -> None:
    from mlflow.models import Model
    from mlflow.models.model import MLMODEL_FILE_NAME

    if any(file.path == MLMODEL_FILE_NAME for file in client.list_logged_model_artifacts(checkpoint.model_id)):
        return
    flavour = {"loader_module": _LOADER, "python_version": platform.python_version()}
    model = Model(run_id=checkpoint.run_id, flavors={"python_function": flavour}, model_id=checkpoint.model_id)
    with tempfile.TemporaryDirectory(prefix="ddpm-mlmodel-") as folder:
        path = Path(folder) / MLMODEL_FILE_NAME
        model.save(str(path))
        client.log_model_artifact(checkpoint.model_id, str(path))
