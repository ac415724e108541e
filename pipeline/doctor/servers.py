"""The servers that jobs talk to: MLflow, and a Ray cluster."""

import os
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from pipeline import cluster
from pipeline.doctor import nodes
from pipeline.doctor.finding import Finding, fail, guarded, ok, warn
from pipeline.doctor.stores import clock
from pipeline.errors import WorldError
from pipeline.tracking import Tracker

__all__ = ["jobs_api", "mlflow_answers", "ray_answers", "ray_dashboard"]

_TOKEN_ON_ALL = "set RAY_AUTH_MODE=token on all nodes"


def mlflow_answers() -> list[Finding]:
    """MLflow takes a run and gives it back; the run is deleted afterwards."""
    tracker = Tracker()
    started = time.monotonic()
    tracker.probe()
    seconds = time.monotonic() - started
    findings = [ok("mlflow", f"{tracker.shown_uri} takes runs; a metric, an artifact and back in {seconds:.1f} s")]
    if (off := tracker.clock_offset_seconds()) is not None:
        findings.append(clock("MLflow", off))
    return findings


def ray_answers() -> list[Finding]:
    """Joins the cluster at ``RAY_ADDRESS`` and looks at its nodes, or starts Ray here as a job would."""
    address = os.environ.get("RAY_ADDRESS")
    with cluster.connect(num_cpus=1):
        count, resources = cluster.inventory()
        has = f"{count} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
        if not address:
            return [ok("ray", f"starts on this machine, with a token of its own: {has}")]
        findings = [*nodes.each_node(), *nodes.each_gpu()]
        dashboard = None if os.environ.get("RAY_API_SERVER_ADDRESS") else cluster.dashboard()
    if dashboard:
        findings += guarded("jobs", "is the dashboard's port open between the nodes?", lambda: jobs_api(dashboard))
    return [_guarded_by_token(address, has), *findings]


def _guarded_by_token(address: str, has: str) -> Finding:
    """Whether the cluster lets a stranger in; what this process shows says nothing about that."""
    if cluster.admits_stranger(address):
        return warn("ray", f"{address} runs anybody's code: it asks for no token; {has}", _TOKEN_ON_ALL)
    return ok("ray", f"{address} takes this token and refuses another: {has}")


def ray_dashboard() -> list[Finding]:
    """If ``ray job submit`` is set up: the Jobs API answers with this token, and refuses without one."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address or urlsplit(address).scheme not in ("http", "https"):
        return []
    return jobs_api(address)


def jobs_api(address: str) -> list[Finding]:
    """The Jobs API at the dashboard's address answers with this token, and refuses without one."""
    url = f"{address.rstrip('/')}/api/jobs/"
    token = cluster.token()
    status = _status(url, {"Authorization": f"Bearer {token}"} if token else {})
    if status in (401, 403):
        mend = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
        return [fail("jobs", f"{address} refuses this token" if token else f"{address} asks for a token", mend)]
    if status != 200:
        return [fail("jobs", f"{address} answers HTTP {status}", "is it the dashboard of a Ray cluster?")]
    if _status(url, {}) == 200:
        return [warn("jobs", f"{address} runs anybody's code: it asks for no token", _TOKEN_ON_ALL)]
    return [ok("jobs", f"{address} takes this token and refuses strangers")]


def _status(url: str, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        raise WorldError(f"{url} does not answer: {error}") from error
