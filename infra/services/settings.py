"""Where the services keep their data, on which ports they listen, and the secrets that are made for them."""

import json
import os
import secrets
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from errors import ServiceError

BUCKET = "ddpm"
MLFLOW_PREFIX = "mlflow"
REGION = "us-east-1"
DATABASES = ("mlflow", "mlflow_auth")
"""What MLflow records, and its users."""

SECRETS = {
    "postgres": ("postgres_password",),
    "mlflow-admin": ("mlflow_admin_password",),
    "mlflow-writer": ("mlflow_writer_password",),
    "mlflow-reader": ("mlflow_reader_password",),
    "mlflow-session": ("mlflow_session_key",),
    "s3-writer": ("s3_writer_key", "s3_writer_secret"),
    "s3-reader": ("s3_reader_key", "s3_reader_secret"),
    "s3-mlflow": ("s3_mlflow_key", "s3_mlflow_secret"),
    "s3-inner": ("s3_inner_key",),
}
"""What can be replaced by itself, and its names in ``secrets.json``."""
LOGINS = {"admin": "admin", "writer": "ddpm", "reader": "ddpm-reader"}
"""MLflow's names of its users."""


@dataclass(frozen=True, kw_only=True)
class Ports:
    """SeaweedFS takes four more after ``s3``, and each of its five again 10,000 higher."""

    mlflow: int = 5000
    s3: int = 8333
    postgres: int = 15432


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One set of services: a folder, an address and ports."""

    folder: Path
    bind: str = "127.0.0.1"
    ports: Ports = Ports()

    @property
    def mlflow_uri(self) -> str:
        """What clients of MLflow use."""
        return f"http://{self.bind}:{self.ports.mlflow}"

    @property
    def s3_uri(self) -> str:
        """What clients of the S3 store use."""
        return f"http://{self.bind}:{self.ports.s3}"

    @cached_property
    def secrets(self) -> dict[str, str]:
        """The secrets by name; one that is not in the file is made, the others stay.

        Raises:
            ServiceError: The file was broken by hand.
        """
        path = self.folder / "secrets.json"
        try:
            found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ServiceError(f"{path} is no JSON ({error}); mend it, or remove it for new secrets") from error
        missing = [name for names in SECRETS.values() for name in names if not found.get(name)]
        if missing:
            found |= {name: secrets.token_hex(24) for name in missing}
            write_private(path, json.dumps(found, indent=1))
        return found

    def renew(self, what: str) -> None:
        """Makes other secrets in place of some, or of ``all``; ``up`` brings them to the servers."""
        names = {name for key, names in SECRETS.items() if what in (key, "all") for name in names}
        kept = {name: value for name, value in self.secrets.items() if name not in names}
        write_private(self.folder / "secrets.json", json.dumps(kept, indent=1))
        self.__dict__.pop("secrets")  # what cached_property remembers

    def database(self, name: str) -> str:
        """A database's SQLAlchemy URI, which holds the password."""
        return (
            f"postgresql+psycopg2://mlflow:{self.secrets['postgres_password']}@127.0.0.1:{self.ports.postgres}/{name}"
        )

    def environment(self, user: str) -> dict[str, str]:
        """What a person or a job needs to be ``writer``, ``reader`` or ``admin``."""
        keys = "reader" if user == "reader" else "writer"
        variables = {
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "MLFLOW_TRACKING_USERNAME": LOGINS[user],
            "MLFLOW_TRACKING_PASSWORD": self.secrets[f"mlflow_{user}_password"],
            "AWS_ENDPOINT_URL": self.s3_uri,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": self.secrets[f"s3_{keys}_key"],
            "AWS_SECRET_ACCESS_KEY": self.secrets[f"s3_{keys}_secret"],
        }
        if user != "reader":  # who may not write works in a folder of its own
            variables["DDPM_HOME"] = f"s3://{BUCKET}/home"
        if user == "admin":
            variables |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports.postgres), "PGUSER": "mlflow"}
            variables |= {"PGPASSWORD": self.secrets["postgres_password"]}
        return variables

    def write_environments(self) -> None:
        """Writes one file for each user, for ``source``."""
        for user in ("writer", "reader", "admin"):
            lines = [f"export {name}={shlex.quote(value)}" for name, value in self.environment(user).items()]
            write_private(self.folder / f"{user}.env", "\n".join([*lines, ""]))


def default_folder() -> Path:
    """``$DDPM_SERVICES``, else a folder that outlives a clone; root's is one that the user postgres can enter."""
    if given := os.environ.get("DDPM_SERVICES"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/ddpm-services")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ddpm-services"


def write_private(path: Path, text: str) -> None:
    """Writes a file that nobody else can read at any moment."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
