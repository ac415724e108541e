"""``infra/aws``: the roles of head and workers may do what Ray's provider does for ``ray_cluster.yaml``, no more."""

import inspect
import json
import re
from typing import Any

import botocore.session
import pytest
from botocore import xform_name
from infra_files import INFRA, ROOT, load

# Imports of Ray warn of its own use of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLUSTER = load(ROOT / "ray_cluster.yaml")
POLICIES = {name: json.loads((INFRA / "aws" / f"{name}-policy.json").read_text()) for name in ("head", "worker")}
ANYWHERE = {"ec2:DescribeInstances", "ecr:GetAuthorizationToken"}
"""Actions that AWS grants for all resources or not at all."""

RESOURCE_CALLS = {
    "instances.filter": "DescribeInstances",
    "create_instances": "RunInstances",
    "terminate": "TerminateInstances",
    "stop": "StopInstances",
    "wait_until_stopped": "DescribeInstances",
}
"""Members of boto3's resources, and the operations behind them."""

NOT_HERE = {
    "StartInstances": "cache_stopped_nodes is false",
    "StopInstances": "cache_stopped_nodes is false",
    "DescribeImages": "CloudWatch's agent is not set up",
    "DescribeInstanceTypes": "ray up asks for it, not the head",
}


def values(entry: Any) -> list[str]:
    return entry if isinstance(entry, list) else [entry]


def statements(name: str, action: str) -> list[dict[str, Any]]:
    return [statement for statement in POLICIES[name]["Statement"] if action in values(statement["Action"])]


def calls_of_the_provider() -> set[str]:
    """EC2 operations in the source of Ray's provider for AWS."""
    from ray.autoscaler._private.aws import node_provider

    source = inspect.getsource(node_provider)
    known = botocore.session.get_session().get_service_model("ec2").operation_names
    operations = {xform_name(name): name for name in known}
    found = {operations[name] for name in re.findall(r"\bec2(?:\.meta\.client)?\.(\w+)(?=\(|\n)", source)
             if name in operations}  # fmt: skip
    members = re.findall(r"\bec2\w*\.(instances\.filter|create_instances)|\bnode\.(\w+)\(", source)
    return found | {RESOURCE_CALLS[first or second] for first, second in members}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_names_its_actions_and_its_resources(name: str) -> None:
    policy = POLICIES[name]
    assert policy.keys() == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    names = [statement["Sid"] for statement in policy["Statement"]]
    assert len(names) == len(set(names))
    for statement in policy["Statement"]:
        assert statement.keys() - {"Condition"} == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
        assert not [action for action in values(statement["Action"]) if "*" in action]
        assert "*" not in values(statement["Resource"]) or set(values(statement["Action"])) <= ANYWHERE


def test_every_action_exists() -> None:
    session = botocore.session.get_session()
    known = {
        f"{service}:{operation}"
        for service in ("ec2", "ecr")
        for operation in session.get_service_model(service).operation_names
    }
    actions = {action for policy in POLICIES.values() for entry in policy["Statement"] for action in entry["Action"]}
    assert {action for action in actions if action.startswith(("ec2:", "ecr:"))} <= known
    assert {action for action in actions if action.startswith("iam:")} == {"iam:PassRole"}


def test_the_head_may_make_every_call_that_rays_provider_makes_and_no_other() -> None:
    calls = calls_of_the_provider()
    assert {"RunInstances", "TerminateInstances", "DescribeInstances", "CreateTags"} <= calls
    assert calls >= NOT_HERE.keys()
    assert CLUSTER["provider"]["cache_stopped_nodes"] is False
    allowed = {action for entry in POLICIES["head"]["Statement"] for action in entry["Action"] if "ec2:" in action}
    assert allowed == {f"ec2:{call}" for call in calls - NOT_HERE.keys()}


def test_the_head_ends_and_tags_only_nodes_of_its_cluster() -> None:
    own = {"aws:ResourceTag/ray-cluster-name": CLUSTER["cluster_name"]}
    assert [entry["Condition"]["StringEquals"] for entry in statements("head", "ec2:TerminateInstances")] == [own]
    conditions = [entry["Condition"]["StringEquals"] for entry in statements("head", "ec2:CreateTags")]
    assert conditions == [{"ec2:CreateAction": "RunInstances"}, own]


def test_the_head_starts_only_the_machines_of_the_cluster_file() -> None:
    nodes = {name: node for name, node in CLUSTER["available_node_types"].items() if name != "head"}
    (start, beside) = statements("head", "ec2:RunInstances")
    conditions = start["Condition"]["StringEquals"]
    assert set(conditions["ec2:InstanceType"]) == {node["node_config"]["InstanceType"] for node in nodes.values()}
    assert conditions["aws:RequestTag/ray-cluster-name"] == CLUSTER["cluster_name"]
    kinds = {resource.rpartition(":")[2].partition("/")[0] for resource in beside["Resource"]}
    assert kinds >= {"image", "key-pair", "network-interface", "security-group", "subnet", "volume"}
    assert "spot-instances-request" in kinds, "asked for since spot requests have a resource of their own"
    assert all(":instance/" not in resource for resource in beside["Resource"])


def test_the_head_may_hand_on_the_workers_role_alone_and_workers_none() -> None:
    (entry,) = statements("head", "iam:PassRole")
    assert entry["Resource"] == "arn:aws:iam::ACCOUNT_ID:role/ddpm-ray-worker"
    assert entry["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    workers = {action.partition(":")[0] for item in POLICIES["worker"]["Statement"] for action in item["Action"]}
    assert workers == {"s3", "ecr"}


@pytest.mark.parametrize("name", POLICIES)
def test_both_reach_the_part_of_the_bucket_that_holds_ddpm_home(name: str) -> None:
    (home,) = (
        option.partition("DDPM_HOME=s3://")[2] for option in CLUSTER["docker"]["run_options"] if "HOME" in option
    )
    bucket, _, prefix = home.partition("/")
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        assert [entry["Resource"] for entry in statements(name, action)] == [f"arn:aws:s3:::{bucket}/{prefix}/*"]
    (listing,) = statements(name, "s3:ListBucket")
    assert listing["Resource"] == f"arn:aws:s3:::{bucket}"
    assert "Condition" not in listing, "with one on the prefix S3 answers 403, not 404, for an object that is missing"


@pytest.mark.parametrize("name", POLICIES)
def test_the_region_is_that_of_the_cluster_and_the_cluster_file_names_the_policy(name: str) -> None:
    text = (INFRA / "aws" / f"{name}-policy.json").read_text()
    assert set(re.findall(r"arn:aws:(?:ec2|ecr):([\w-]+)", text)) == {CLUSTER["provider"]["region"]}
    assert f"infra/aws/{name}-policy.json" in (ROOT / "ray_cluster.yaml").read_text()
