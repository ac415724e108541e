"""``infra/compose``: nothing is reachable from outside, nothing has a default password, everything says it is ready."""

import configparser
import importlib
import re
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import click
import compose_spec
import pytest
import yaml
from infra_files import INFRA, load

COMPOSE = INFRA / "compose"
FILE = load(COMPOSE / "compose.yaml")
SERVICES: dict[str, Any] = FILE["services"]
SECRETS = ("PASSWORD", "SECRET", "ACCESS_KEY")


def example_names() -> set[str]:
    lines = (COMPOSE / ".env.example").read_text().splitlines()
    return {line.partition("=")[0] for line in lines if line and not line.startswith("#")}


def test_ports_are_bound_to_this_machine_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert sorted(published) == ["127.0.0.1:15432:5432", "127.0.0.1:5000:5000", "127.0.0.1:8333:8333"]


def test_it_satisfies_the_compose_specification() -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    assert set(compose_spec.PyCompose.from_yaml(text).service_names()) == set(SERVICES)
    with pytest.raises(ValueError, match="happy"):
        compose_spec.PyCompose.from_yaml(text.replace("service_healthy", "service_happy", 1))


@pytest.mark.parametrize("name", SERVICES)
def test_every_secret_comes_from_the_environment_and_is_required(name: str) -> None:
    for key, value in SERVICES[name].get("environment", {}).items():
        if any(word in key for word in SECRETS):
            assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{key} has a default"


def test_users_and_passwords_in_files_come_from_the_environment_too() -> None:
    s3 = yaml.safe_load(FILE["configs"]["s3_users"]["content"])["identities"]
    actions = {user["name"]: user["actions"] for user in s3}
    assert actions["ddpm-reader"] == ["Read:ddpm", "List:ddpm"]
    assert "Write:ddpm" in actions["ddpm-writer"]
    assert all(":" in action for user in actions.values() for action in user), "nobody may touch another bucket"
    keys = [value for user in s3 for pair in user["credentials"] for value in pair.values()]
    assert actions["ddpm-mlflow"] == [f"{verb}:ddpm/mlflow/*" for verb in ("Read", "Write", "List", "Tagging")]
    assert len(set(keys)) == 6
    assert all(re.fullmatch(r"\$\{\w+:\?[^}]+\}", key) for key in keys)


def test_mlflow_asks_for_a_login_and_its_two_users_are_made() -> None:
    assert mlflow_options()["app_name"] == "basic-auth"
    auth = configparser.ConfigParser(interpolation=None)
    auth.read_string(FILE["configs"]["mlflow_auth"]["content"])
    assert auth["mlflow"]["default_permission"] == "READ"
    assert auth["mlflow"]["database_uri"].endswith("/mlflow_auth")
    assert "mlflow_auth" in FILE["configs"]["postgres_databases"]["content"]
    assert SERVICES["mlflow"]["environment"]["MLFLOW_AUTH_CONFIG_PATH"] == "/etc/mlflow/auth.ini"
    users = SERVICES["mlflow-users"]
    assert "users.py ddpm ddpm-reader " in users["command"][-1]
    assert {"DDPM_PASSWORD", "DDPM_READER_PASSWORD"} <= users["environment"].keys()
    assert (COMPOSE / FILE["configs"]["mlflow_users"]["file"]).is_file()


def test_the_services_without_containers_have_the_same_ports_bucket_and_users() -> None:
    settings = services_settings()
    ports = settings.Ports()
    published = {port for service in SERVICES.values() for port in service.get("ports", [])}
    assert {f"127.0.0.1:{ports.mlflow}:5000", f"127.0.0.1:{ports.s3}:8333"} < published
    assert f"127.0.0.1:{ports.postgres}:5432" in published
    assert f"-bucket={settings.BUCKET}" in SERVICES["seaweedfs"]["command"]
    assert mlflow_options()["artifacts_destination"] == f"s3://{settings.BUCKET}/{settings.MLFLOW_PREFIX}"


def test_mlflows_server_has_the_key_of_its_prefix_and_the_store_answers_no_http_without_one() -> None:
    mlflow = SERVICES["mlflow"]["environment"]
    assert "S3_MLFLOW_" in mlflow["AWS_ACCESS_KEY_ID"]
    assert "S3_MLFLOW_" in mlflow["AWS_SECRET_ACCESS_KEY"]
    assert "-disableHttp" in SERVICES["seaweedfs"]["command"]
    assert {"WEED_JWT_SIGNING_KEY", "WEED_JWT_SIGNING_READ_KEY"} <= SERVICES["seaweedfs"]["environment"].keys()


def test_no_command_line_carries_a_secret() -> None:
    for service in SERVICES.values():
        assert "${" not in " ".join(service.get("command", []))


def test_the_example_names_every_variable_and_gives_no_value() -> None:
    used = set(re.findall(r"\$\{(\w+)", (COMPOSE / "compose.yaml").read_text()))
    lines = (COMPOSE / ".env.example").read_text().splitlines()
    assert example_names() == used
    assert all(line.endswith("=") for line in lines if line and not line.startswith("#"))


def test_git_ignores_the_filled_in_environment() -> None:
    assert ".env" in (COMPOSE / ".gitignore").read_text().split()


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check_and_comes_back_after_a_crash(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries"} <= check.keys()
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_mlflow_waits_for_a_healthy_database_and_store() -> None:
    conditions = {name: value["condition"] for name, value in SERVICES["mlflow"]["depends_on"].items()}
    assert conditions == {"postgres": "service_healthy", "seaweedfs": "service_healthy"}


@pytest.mark.parametrize(("name", "folder"), [("postgres", "/var/lib/postgresql/data"), ("seaweedfs", "/data")])
def test_data_lives_in_named_volumes(name: str, folder: str) -> None:
    (mount,) = SERVICES[name]["volumes"]
    volume, _, target = mount.partition(":")
    assert target == folder
    assert volume in FILE["volumes"]


def test_images_are_pinned() -> None:
    images = [service["image"] for service in SERVICES.values() if "image" in service]
    assert all(re.search(r":[0-9]+\.[0-9]+", image) for image in images)


def test_mlflow_accepts_its_command_line() -> None:
    options = mlflow_options()
    assert options["artifacts_destination"].startswith("s3://")
    assert options["serve_artifacts"] is True


def test_mlflow_refuses_foreign_host_names_and_answers_to_its_own() -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    allowed = mlflow_options()["allowed_hosts"].split(",")
    assert all(is_allowed_host_header(allowed, host) for host in ("mlflow:5000", "localhost:5000", "127.0.0.1:5000"))
    assert not is_allowed_host_header(allowed, "evil.example:5000")


def test_the_bucket_that_mlflow_writes_to_is_created() -> None:
    bucket = mlflow_options()["artifacts_destination"].removeprefix("s3://").partition("/")[0]
    assert f"-bucket={bucket}" in SERVICES["seaweedfs"]["command"]


def test_mlflow_finds_the_other_services_by_name() -> None:
    environment = SERVICES["mlflow"]["environment"]
    assert "@postgres:5432/mlflow" in environment["MLFLOW_BACKEND_STORE_URI"]
    assert environment["MLFLOW_S3_ENDPOINT_URL"] == "http://seaweedfs:8333"
    assert "-s3.port=8333" in SERVICES["seaweedfs"]["command"]


def test_mlflow_starts_no_job_runners() -> None:
    assert SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_the_server_has_the_clients_version_and_is_not_root() -> None:
    build = SERVICES["mlflow"]["build"]
    dockerfile = (COMPOSE / build["context"] / build["dockerfile"]).read_text()
    assert "--constraint /tmp/constraints.txt mlflow " in dockerfile
    constraints = (COMPOSE / build["context"] / "constraints.txt").read_text().split()
    assert f"mlflow=={metadata.version('mlflow')}" in constraints
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)[-1] not in ("root", "0")


def test_the_build_sees_the_constraints_and_no_secret() -> None:
    builds = [service["build"] for service in SERVICES.values() if "build" in service]
    assert len(builds) == 2
    for build in builds:
        ignore = COMPOSE / build["context"] / f"{build['dockerfile']}.dockerignore"
        lines = [line for line in ignore.read_text().splitlines() if not line.startswith("#")]
        assert lines == ["*", "!constraints.txt"]


def test_jobs_ask_the_server_for_artifacts_and_not_a_store_whose_name_only_it_knows() -> None:
    """MLflow would hand out addresses of ``seaweedfs``, which the machine outside the containers cannot find."""
    from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD

    import pipeline.tracking.store  # noqa: F401

    assert "//seaweedfs:" in SERVICES["mlflow"]["environment"]["MLFLOW_S3_ENDPOINT_URL"]
    assert MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD.is_set()
    assert MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD.get() is False


def services_settings() -> ModuleType:
    """``infra/services/settings.py``, which is no part of a package."""
    sys.path.append(str(INFRA / "services"))
    return importlib.import_module("settings")


def mlflow_options() -> dict[str, Any]:
    """What ``mlflow server`` understands of the command; an unknown flag raises."""
    from mlflow.cli import server

    program, verb, *flags = SERVICES["mlflow"]["command"]
    assert (program, verb) == ("mlflow", "server")
    assert isinstance(server, click.Command)
    return server.make_context("server", flags).params
