"""The doctor as a person calls it, on a machine where nothing is set up, and where the set-up is wrong."""

import socket

import pytest
from runner import run_job

pytestmark = pytest.mark.slow


def test_on_a_laptop_without_any_set_up_all_is_well() -> None:
    done = run_job("doctor", "--json")
    assert done.code == 0, done.stdout
    found = {finding["check"]: finding["state"] for finding in done.result["findings"]}
    assert {"versions", "memory", "disk", "torch", "storage", "mlflow", "ray"} <= found.keys()
    assert found["ray"] == found["mlflow"] == found["storage"] == "ok"


def test_each_server_that_is_away_is_a_line_that_says_what_to_mend() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{probe.getsockname()[1]}"
    keys = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_MAX_ATTEMPTS": "1"}
    servers = {"MLFLOW_TRACKING_URI": f"http://me:hidden-word@{away}", "AWS_ENDPOINT_URL": f"http://{away}"}
    done = run_job("doctor", DDPM_HOME="s3://bucket/home", RAY_API_SERVER_ADDRESS=f"http://{away}", **keys, **servers)
    assert done.code == 1
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("fail")}
    assert lines.keys() == {"storage", "mlflow", "jobs"}
    assert all(" -> " in line for line in lines.values())
    assert "very-secret" not in done.stdout + done.stderr
    assert "hidden-word" not in done.stdout + done.stderr
