"""``ray_cluster.yaml`` against Ray's own schema and code, and against the parameters of EC2: nothing here needs AWS."""

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import botocore.session
import click
import jsonschema
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from infra_files import IMAGE_PROJECT, INFRA, ROOT, load, parsed

# Imports of Ray warn of its own use of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PATH = ROOT / "ray_cluster.yaml"
CLUSTER = load(PATH)
NODE_TYPES: dict[str, Any] = CLUSTER["available_node_types"]
GPU_TYPES = {name: node for name, node in NODE_TYPES.items() if node["resources"].get("GPU")}


def schema_errors(cluster: dict[str, Any]) -> list[str]:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(cluster)]


def ec2_errors(node_config: dict[str, Any]) -> str:
    """What EC2's RunInstances would refuse of a node_config, which Ray passes on unread."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape).generate_report()


def test_it_satisfies_rays_schema() -> None:
    assert schema_errors(CLUSTER) == []


def test_rays_schema_notices_a_misspelt_key() -> None:
    assert schema_errors(CLUSTER | {"max_worker": 3})


def test_ray_prepares_and_validates_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    assert prepared["setup_commands"] == []
    assert prepared["head_setup_commands"] == []
    assert prepared["worker_setup_commands"] == []


@pytest.mark.parametrize("name", NODE_TYPES)
def test_ec2_accepts_the_parameters_of_every_node_type(name: str) -> None:
    assert ec2_errors(NODE_TYPES[name]["node_config"]) == ""


def test_the_check_of_ec2_parameters_notices_a_misspelt_key() -> None:
    assert "HttpToken" in ec2_errors({"MetadataOptions": {"HttpToken": "required"}})


@pytest.mark.parametrize("name", NODE_TYPES)
def test_every_node_serves_only_version_2_of_the_metadata_service(name: str) -> None:
    options = NODE_TYPES[name]["node_config"]["MetadataOptions"]
    assert options == {"HttpTokens": "required", "HttpPutResponseHopLimit": 2}


@pytest.mark.parametrize("name", NODE_TYPES)
def test_every_node_has_a_role_and_a_closed_security_group_and_encrypted_disks(name: str) -> None:
    node = NODE_TYPES[name]["node_config"]
    assert node["IamInstanceProfile"]["Name"] == ("ddpm-ray-head" if name == "head" else "ddpm-ray-worker")
    assert node["SecurityGroupIds"], "without a group Ray makes one that opens SSH to the world"
    assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_the_head_is_on_demand_and_takes_no_work() -> None:
    head = NODE_TYPES[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


@pytest.mark.parametrize(("name", "gpus"), [("gpu", 4), ("gpu1", 1)])
def test_gpu_workers_are_spot_first_with_the_same_machine_on_demand_behind(name: str, gpus: int) -> None:
    spot, on_demand = GPU_TYPES[f"{name}_spot"], GPU_TYPES[f"{name}_on_demand"]
    assert spot["node_config"] == on_demand["node_config"] | {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert spot["resources"] == on_demand["resources"]
    assert spot["resources"]["GPU"] == gpus
    assert spot["priority"] > on_demand["priority"]


def test_ec2_accepts_the_network_of_the_comment_about_efa() -> None:
    lines = PATH.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.strip() == "# NetworkInterfaces:")
    block = "\n".join(line.strip().removeprefix("# ") for line in lines[start : start + 7])
    network = yaml.safe_load(block.replace("# NetworkInterfaces", "NetworkInterfaces"))
    plain = {
        name: value for name, value in GPU_TYPES["gpu_on_demand"]["node_config"].items() if name != "SecurityGroupIds"
    }
    assert network["NetworkInterfaces"][0]["InterfaceType"] == "efa"
    assert network["Placement"]["GroupName"]
    assert ec2_errors({**plain, **network}) == ""


def test_the_autoscaler_may_go_down_to_no_gpu_and_up_to_every_type() -> None:
    assert all(node["min_workers"] == 0 for node in NODE_TYPES.values())
    assert CLUSTER["max_workers"] == sum(node["max_workers"] for node in NODE_TYPES.values())
    assert CLUSTER["idle_timeout_minutes"] > 0


def test_nodes_share_one_zone_and_are_terminated_not_stopped() -> None:
    provider = CLUSTER["provider"]
    assert "," not in provider["availability_zone"]
    assert provider["availability_zone"].startswith(provider["region"])
    assert provider["cache_stopped_nodes"] is False


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_rays_command_line_accepts_the_start_commands(commands: str) -> None:
    stop, start = CLUSTER[commands]
    assert stop == "ray stop"
    limit, _, ray_start = start.partition("; ")
    assert limit == "ulimit -n 65536"
    ray_start_parameters(ray_start)


def test_the_dashboard_listens_on_the_heads_loopback_only() -> None:
    head = ray_start_parameters(CLUSTER["head_start_ray_commands"][1].partition("; ")[2])
    assert head["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"]


def test_workers_call_the_port_that_the_head_listens_on() -> None:
    head = ray_start_parameters(CLUSTER["head_start_ray_commands"][1].partition("; ")[2])
    worker = ray_start_parameters(CLUSTER["worker_start_ray_commands"][1].partition("; ")[2])
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert worker["object_manager_port"] == head["object_manager_port"]


def test_every_container_asks_for_the_token_that_is_copied_to_it() -> None:
    assert "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert CLUSTER["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "/home/ray" in (INFRA / "image" / "Dockerfile").read_text()


def test_containers_carry_settings_but_no_credentials() -> None:
    options = [option.split()[1] for option in CLUSTER["docker"]["run_options"] if option.startswith("--env ")]
    settings = dict(option.split("=", 1) for option in options)
    assert settings["DDPM_HOME"].startswith("s3://")
    assert settings["MLFLOW_TRACKING_URI"].startswith("http")
    assert settings["AWS_DEFAULT_REGION"] == CLUSTER["provider"]["region"]
    assert not [name for name in settings if "KEY" in name or "SECRET" in name]


def test_the_command_in_its_comments_is_one_the_job_understands_and_the_cluster_can_hold() -> None:
    (line,) = (line for line in PATH.read_text().splitlines() if "jobs/train.py" in line)
    _, config = parsed(line.lstrip("# "))
    gpus = max(node["resources"]["GPU"] * node["max_workers"] for node in GPU_TYPES.values())
    assert config.name == "cifar10-linear"
    assert config.cluster.use_gpu
    assert config.cluster.num_workers <= gpus


def test_its_image_is_the_one_of_kuberay() -> None:
    (image,) = load(INFRA / "kuberay" / "base" / "kustomization.yaml")["images"]
    assert CLUSTER["docker"]["image"] == f"{image['newName']}:{image['newTag']}"
    assert f"WORKDIR {IMAGE_PROJECT}\n" in (INFRA / "image" / "Dockerfile").read_text()


def test_every_name_to_replace_is_listed_at_its_top() -> None:
    text = PATH.read_text()
    top, values = text[: text.index("cluster_name:")], yaml.safe_dump(CLUSTER)
    for name in ("IMAGE_HOST", "BUCKET", "MLFLOW_HOST", "AMI_ID", "SECURITY_GROUP_ID"):
        assert name in top
        assert name in values


def ray_start_parameters(command: str) -> dict[str, Any]:
    """What ``ray start`` understands of a command; an unknown flag raises."""
    from ray.scripts.scripts import start

    program, verb, *flags = shlex.split(command)
    assert (program, verb) == ("ray", "start")
    assert isinstance(start, click.Command)
    return start.make_context("start", flags).params
