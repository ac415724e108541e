"""The schedule's entrypoint beside a real Ray cluster: what becomes of the job when the tick ends, and the reverse."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import RAY, Cluster, cluster
from infra_files import INFRA

pytestmark = pytest.mark.slow


def settings(nodes: Cluster, folder: Path, script: str) -> dict[str, str]:
    """What a tick is started with; the cluster's python is ``script``."""
    folder.mkdir()
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    ray = folder / "ray"
    ray.write_text(f"#!{sys.executable}\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    return {
        **os.environ,
        **nodes.environment,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{nodes.dashboard_port}",
        "DDPM_TICK": folder.name,
        "DDPM_LOCK": str(folder / "lock"),
        "DDPM_PYTHON": str(python),
        "DDPM_CLUSTER_PYTHON": str(python),
    }


def start(environment: dict[str, str]) -> "subprocess.Popen[str]":
    script, pipe = str(INFRA / "schedules" / "evaluate.sh"), subprocess.PIPE
    return subprocess.Popen([script], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_tick_that_is_ended_stops_its_job_and_one_whose_job_fails_fails(tmp_path: Path) -> None:
    """Side by side: most of the time Ray's command line is being imported."""
    with cluster(head_cpus=1, dashboard=True) as nodes:
        long = settings(nodes, tmp_path / "long", f"touch {tmp_path}/started; exec sleep 600")
        ended, failing = start(long), start(settings(nodes, tmp_path / "failing", "echo broken; exit 3"))
        try:
            deadline = time.monotonic() + 400
            while not (tmp_path / "started").exists():
                assert ended.poll() is None, ended.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            ended.send_signal(signal.SIGTERM)
            _, said = ended.communicate(timeout=400)
            log, why = failing.communicate(timeout=400)
        finally:
            ended.kill()
            failing.kill()
        assert ended.returncode == 130, said
        assert "Job 'long' was stopped" in said
        words = [*RAY, "job", "status", "long"]
        asked = subprocess.run(words, env=long, capture_output=True, text=True, timeout=400)
        assert "was stopped" in asked.stdout + asked.stderr
    assert failing.returncode == 1
    assert "broken" in log
    assert "exit code 3" in why
