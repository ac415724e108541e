"""Who is told what about the cluster that a job runs on."""

import os
from contextlib import nullcontext

import pytest

from pipeline import cluster
from pipeline.errors import UserError


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``set_environment`` sets for good, for one test."""
    for name, value in cluster._QUIET.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", cluster._JOINED, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("joined", [False, True])
def test_workers_know_as_their_driver_does_whether_the_cluster_is_private(
    quiet: None, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    """A sweep's trial trains from a worker, to which Ray gives no ``RAY_ADDRESS``."""
    if joined:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.is_private() != joined
    of_workers = cluster._env_vars()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in of_workers.items():
        monkeypatch.setenv(name, value)
    assert cluster.is_private() != joined
    cluster.set_patience(hung_after_seconds=1, barrier_seconds=1, elastic=False)
    assert os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == (None if joined else "0")
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == ("1800" if joined else "60")
    monkeypatch.setattr(cluster, "fits", lambda **_: 0)
    with nullcontext() if joined else pytest.raises(UserError, match="--use-gpu"):  # a joined cluster grows
        cluster.require(num_workers=1, cpus_per_worker=1, use_gpu=True)
