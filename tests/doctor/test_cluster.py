"""The doctor on clusters: a token that nobody asks for, nodes without the head's keys, MLflow without artifacts."""

from pathlib import Path

import boto3
import pytest
from clusters import cluster
from runner import run_job
from servers import S3Server, mlflow_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def findings(check: str, result: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return [finding for finding in result["findings"] if finding["check"] == check]


def test_a_cluster_that_lets_anybody_in_is_a_warning_whatever_this_client_shows() -> None:
    with cluster(head_cpus=1, token=False) as nodes:
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
        done = run_job("doctor", "--json", **{**nodes.environment, **mine})
    (ray,) = findings("ray", done.result)
    assert ray["state"] == "warn"
    assert "asks for no token" in ray["text"]


def test_each_node_is_looked_at_and_one_without_the_keys_of_this_machine_is_named(s3: S3Server) -> None:
    keys = s3.environment()
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3.admin.access_key,
        aws_secret_access_key=s3.admin.secret_key,
    )
    client.create_bucket(Bucket="looked-at")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with cluster(head_cpus=1) as nodes:
            well = run_job("doctor", "--json", **nodes.environment)
            bad = run_job("doctor", "--json", **{**nodes.environment, **keys, "DDPM_HOME": "s3://looked-at/home"},
                          MLFLOW_TRACKING_URI="sqlite:////tmp/never-made/mlflow.db")  # fmt: skip
    assert [finding["state"] for finding in findings("node", well.result)] == ["ok"]
    assert "refuses another" in findings("ray", well.result)[0]["text"]
    assert "no node with a GPU is up" in findings("gpu", well.result)[0]["text"]
    here, there = findings("storage", bad.result)
    assert (here["state"], there["state"]) == ("ok", "fail")
    assert there["text"].startswith("node ")
    assert s3.admin.secret_key not in bad.stdout


def test_an_mlflow_that_cannot_reach_its_artifacts_is_a_failure(s3: S3Server, tmp_path: Path) -> None:
    wrong = {**s3.environment(), "AWS_SECRET_ACCESS_KEY": "another-secret", "MLFLOW_S3_ENDPOINT_URL": s3.endpoint}
    with mlflow_process(tmp_path, artifacts="s3://nothing-there/mlflow", environment=wrong) as (uri, _):
        done = run_job("doctor", "--json", MLFLOW_TRACKING_URI=uri)
    (mlflow,) = (finding for finding in findings("mlflow", done.result))
    assert mlflow["state"] == "fail"
    assert "takes runs but no artifacts" in mlflow["text"]
