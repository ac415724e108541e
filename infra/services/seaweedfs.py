"""The S3 store: one bucket, a user who may write in it, one who may only read, and MLflow, which has a prefix of it."""

import json
from pathlib import Path

from daemon import Daemon, answers
from programs import Programs
from settings import BUCKET, MLFLOW_PREFIX, Settings, write_private

_ALL = ("Read", "Write", "List", "Tagging")
# Whoever may log in to MLflow names places that its server reads and writes: its key must not open what it has not.
_ACTIONS = {
    "writer": (BUCKET, _ALL),
    "reader": (BUCKET, ("Read", "List")),
    "mlflow": (f"{BUCKET}/{MLFLOW_PREFIX}/*", _ALL),
}


def daemon(settings: Settings, programs: Programs) -> Daemon:
    """The server; its users are written by ``prepare``."""
    s3 = settings.ports.s3
    command = [
        programs.weed, "-logtostderr", "mini", f"-dir={settings.folder / 'seaweedfs'}", f"-ip={settings.bind}",
        f"-ip.bind={settings.bind}", f"-s3.port={s3}", f"-master.port={s3 + 1}", f"-volume.port={s3 + 2}",
        f"-filer.port={s3 + 3}", f"-admin.port={s3 + 4}", f"-s3.config={_users(settings)}", f"-bucket={BUCKET}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
        # Else the filer serves every object without a key, to any web page as well.
        "-disableHttp",
    ]  # fmt: skip
    # What is left of HTTP, the volume server's, gives and takes only what the S3 server signed.
    inner = settings.secrets["s3_inner_key"]
    return Daemon(
        name="seaweedfs",
        folder=settings.folder,
        command=command,
        environment={"WEED_JWT_SIGNING_KEY": inner, "WEED_JWT_SIGNING_READ_KEY": inner},
        reads=_identities(settings),
        ready=lambda: answers(f"{settings.s3_uri}/healthz") and _has_bucket(settings),
        seconds=60,
    )


def prepare(settings: Settings) -> None:
    """Writes the users: who is in no list gets nothing, and nobody may touch another bucket."""
    (settings.folder / "seaweedfs").mkdir(exist_ok=True)
    write_private(_users(settings), _identities(settings))


def _identities(settings: Settings) -> str:
    identities = [
        {
            "name": f"ddpm-{user}",
            "credentials": [
                {
                    "accessKey": settings.secrets[f"s3_{user}_key"],
                    "secretKey": settings.secrets[f"s3_{user}_secret"],
                }
            ],
            "actions": [f"{action}:{where}" for action in actions],
        }
        for user, (where, actions) in _ACTIONS.items()
    ]
    return json.dumps({"identities": identities})


def remove_sockets(settings: Settings) -> None:
    """SeaweedFS leaves its sockets behind."""
    for port in range(settings.ports.s3, settings.ports.s3 + 5):
        for number in (port, port + 10_000):
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                path.unlink(missing_ok=True)


def _has_bucket(settings: Settings) -> bool:
    """The server answers before it has made the bucket."""
    # Here, since where packages are missing a line is to say so.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    mine = settings.environment("writer")
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_uri,
        region_name="us-east-1",
        aws_access_key_id=mine["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=mine["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    try:
        client.head_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError):
        return False
    return True


def _users(settings: Settings) -> Path:
    return settings.folder / "s3-users.json"
