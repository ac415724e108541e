"""The servers that jobs talk to: MLflow, storage and their clocks, a Ray cluster."""

import os
import secrets
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from pipeline import cluster, storage
from pipeline.doctor.finding import Finding, fail, ok, warn
from pipeline.errors import WorldError
from pipeline.tracking import Tracker

__all__ = ["mlflow_answers", "ray_answers", "ray_dashboard", "storage_serves"]

_LATE_SECONDS = 5.0
_TOO_LATE_SECONDS = 60.0
"""Drivers trust the clocks of other machines to a minute; S3 refuses requests that are a quarter of an hour off."""


def mlflow_answers() -> list[Finding]:
    """MLflow takes a run and gives it back; the run is deleted afterwards."""
    tracker = Tracker()
    started = time.monotonic()
    tracker.probe()
    seconds = time.monotonic() - started
    findings = [ok("mlflow", f"{tracker.shown_uri} takes runs; a run, a metric and back in {seconds:.1f} s")]
    if (off := tracker.clock_offset_seconds()) is not None:
        findings.append(clock("MLflow", off))
    return findings


def storage_serves() -> list[Finding]:
    """``$DDPM_HOME`` takes a file, shows it, gives it back and lets it go."""
    location = storage.join(storage.home(), "doctor", secrets.token_hex(8))
    content = secrets.token_bytes(1024)
    started = time.monotonic()
    storage.write_bytes(location, content)
    try:
        if storage.read_bytes(location) != content:
            return [fail("storage", f"{storage.home()} gives back other bytes than it took", "look at the server")]
        if location not in storage.list_files(location.rpartition("/")[0]):
            return [fail("storage", f"{storage.home()} does not list what it took", "allow s3:ListBucket")]
    finally:
        storage.remove(location)
    if storage.exists(location):
        return [fail("storage", f"{storage.home()} keeps what was deleted", "allow s3:DeleteObject")]
    seconds = time.monotonic() - started
    findings = [ok("storage", f"{storage.home()}: write, read, list and delete in {seconds:.2f} s")]
    if storage.is_remote(storage.home()):
        findings.append(clock("S3", storage.clock_offset_seconds(storage.home())))
    return findings


def clock(server: str, offset_seconds: float) -> Finding:
    """How far a server's clock is from this machine's; the header tells whole seconds."""
    text = f"{server}'s clock is {abs(offset_seconds):.0f} s {'ahead of' if offset_seconds > 0 else 'behind'} this one"
    mend = "synchronise both machines (chrony, systemd-timesyncd)"
    if abs(offset_seconds) > _TOO_LATE_SECONDS:
        return fail("clock", text, mend)
    return (
        warn("clock", text, mend)
        if abs(offset_seconds) > _LATE_SECONDS
        else ok("clock", f"{server} and this machine agree")
    )


def ray_answers() -> list[Finding]:
    """Joins the cluster at ``RAY_ADDRESS``, or starts Ray here as a job would, and counts what there is."""
    address = os.environ.get("RAY_ADDRESS")
    with cluster.connect(num_cpus=1):
        nodes, resources = cluster.inventory()
    has = f"{nodes} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    if not address:
        return [ok("ray", f"starts on this machine, with a token of its own: {has}")]
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return [warn("ray", f"{address}: {has}, and no token is asked for", "set RAY_AUTH_MODE=token on all nodes")]
    return [ok("ray", f"{address} takes this token: {has}")]


def ray_dashboard() -> list[Finding]:
    """If ``ray job submit`` is set up: the Jobs API answers with this token, and refuses without one."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address or urlsplit(address).scheme not in ("http", "https"):
        return []
    url = f"{address.rstrip('/')}/api/jobs/"
    token = cluster.token()
    status = _status(url, {"Authorization": f"Bearer {token}"} if token else {})
    if status in (401, 403):
        mend = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
        return [fail("jobs", f"{address} refuses this token" if token else f"{address} asks for a token", mend)]
    if status != 200:
        return [fail("jobs", f"{address} answers HTTP {status}", "is it the dashboard of a Ray cluster?")]
    if _status(url, {}) == 200:
        return [
            warn("jobs", f"{address} runs anybody's code: it asks for no token", "RAY_AUTH_MODE=token on all nodes")
        ]
    return [ok("jobs", f"{address} takes this token and refuses strangers")]


def _status(url: str, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        raise WorldError(f"{url} does not answer: {error}") from error
