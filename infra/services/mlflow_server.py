"""The MLflow server: records in PostgreSQL, artifacts in the bucket, a login for everyone."""

import json
import sys

from daemon import Daemon, answers
from settings import BUCKET, LOGINS, MLFLOW_PREFIX, REGION, Settings, write_private

AUTH = """[mlflow]
default_permission = READ
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Without it each request costs a slow hash; a changed password holds everywhere after a minute.
auth_cache_ttl_seconds = 60
"""


def daemon(settings: Settings, workers: int = 2) -> Daemon:
    """The server. Secrets go by its environment and a private file: everybody on a machine can read command lines."""
    hosts = sorted({"localhost", "localhost:*", "127.0.0.1:*", f"{settings.bind}:*"})
    # On a busy machine a server process takes longer than uvicorn's 5 s to start, and would be killed again and again.
    patience = "--uvicorn-opts=--timeout-worker-healthcheck=60"
    command = [
        sys.executable, "-m", "mlflow", "server", f"--host={settings.bind}", f"--port={settings.ports.mlflow}",
        f"--workers={workers}", patience, "--app-name=basic-auth", "--serve-artifacts",
        f"--artifacts-destination=s3://{BUCKET}/{MLFLOW_PREFIX}", f"--allowed-hosts={','.join(hosts)}",
    ]  # fmt: skip
    auth = settings.folder / "mlflow-auth.ini"
    text = AUTH.format(database=settings.database("mlflow_auth"))
    write_private(auth, text)
    environment = {
        "MLFLOW_BACKEND_STORE_URI": settings.database("mlflow"),
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_AUTH_ADMIN_PASSWORD": settings.secrets["mlflow_admin_password"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": settings.secrets["mlflow_session_key"],
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_uri,
        "AWS_ACCESS_KEY_ID": settings.secrets["s3_mlflow_key"],
        "AWS_SECRET_ACCESS_KEY": settings.secrets["s3_mlflow_secret"],
        "AWS_DEFAULT_REGION": REGION,
        # Seven further processes for features that are not used here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return Daemon(
        name="mlflow",
        folder=settings.folder,
        command=command,
        environment=environment,
        # A worker remembers a password for a minute: with other ones it starts anew.
        reads=json.dumps([text, *(settings.secrets[f"mlflow_{user}_password"] for user in LOGINS)]),
        ready=lambda: answers(f"{settings.mlflow_uri}/health"),
        seconds=400,
    )
