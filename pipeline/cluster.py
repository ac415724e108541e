"""The one place that starts or joins Ray, so that every job does it alike.

With ``RAY_ADDRESS`` set (``ray job submit`` sets it) a job joins that cluster. Without, it starts a private cluster on
this machine and ends it with the job: token authentication with a random token that is never written to disk.
"""

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError, WorldError

__all__ = [
    "admits_stranger", "connect", "dashboard", "fits", "inventory", "is_private", "on_each_node", "require",
    "set_environment", "set_patience", "token",
]  # fmt: skip

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray Tune draws tables of its own; a sweep prints one line a trial.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray Train copies each worker's prints to the driver a second time.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The controller commits a checkpoint and notices a dead worker on this poll; the default of 2 s is a long time
    # for a worker that waits in report().
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The goodbye between workers before they are ended anyway. After a failure one of them does not answer.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # A private cluster starts a process for each CPU ahead of work. None of them is ever used, since the workers of a
    # job have an environment of their own, and they take the time of those that are.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Ray announces this change of behaviour on every start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_JOINED = "DDPM_JOINED_CLUSTER"
"""Set in the workers of a job that joined a cluster: Ray gives them no ``RAY_ADDRESS``, and a sweep's trial is one."""

# What workers on other machines need to find storage and MLflow. Never credentials: env_vars show in the dashboard.
_FORWARDED = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION", "DDPM_HOME")
_FORWARDED_URIS = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL")


def set_environment() -> None:
    """Sets what Ray reads from the environment when it is first imported; later it is too late for the token."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "RAY_ADDRESS" in os.environ or "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def is_private() -> bool:
    """Whether the cluster is the job's own: one machine, which starts and ends with it; true in its workers as well."""
    return not {"RAY_ADDRESS", _JOINED} & os.environ.keys()


def set_patience(*, hung_after_seconds: float, barrier_seconds: float, elastic: bool) -> None:
    """Sets how long Ray Train waits for workers; its controller takes these from the environment of ``fit``.

    Args:
        hung_after_seconds: A worker process that has not answered for so long is replaced, even one that is stopped.
        barrier_seconds: The longest wait of a worker in ``report`` for the others.
        elastic: Whether training starts with as many workers as there are.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(hung_after_seconds))
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(barrier_seconds))
    # Ray counts the workers of a node for 20 s after it died; an elastic group that waits for them only loses time. A
    # fixed one waits for its nodes: a GPU machine of the cloud boots and pulls its image in minutes.
    start = "30" if elastic else "60" if is_private() else "1800"
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", start)
    if is_private():  # nobody announces that its only node will be taken away; the watching process takes seconds
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@contextmanager
def connect(*, num_cpus: int) -> Iterator[None]:
    """Joins the cluster at ``RAY_ADDRESS`` or starts one here; leaves or ends it afterwards.

    Args:
        num_cpus: CPUs that the job's workers ask for; a local cluster offers at least these, so that a machine with
            fewer cores runs slowly instead of waiting for ever.

    Raises:
        WorldError: The cluster does not answer or refuses the token.
    """
    set_environment()
    address = os.environ.get("RAY_ADDRESS")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = (
        {} if address else {"num_cpus": max(num_cpus, os.cpu_count() or 1), "include_dashboard": False}
    )
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",
            log_to_driver="DDPM_WORKER_LOGS" in os.environ,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _env_vars()},
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"join the Ray cluster at RAY_ADDRESS={address}" if address else "start Ray on this machine"
        raise WorldError(f"cannot {where}: {str(error).splitlines()[0]}") from error
    if threading.current_thread() is threading.main_thread() and callable(on_sigterm):
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own handler there, which ends the process
    try:
        yield
    finally:
        ray.shutdown()


def fits(*, num_workers: int, cpus_per_worker: int, use_gpu: bool) -> int:
    """How many groups of such workers the cluster can hold at the same time, as it is now (0: not even one)."""
    import ray

    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    groups = int(total.get("CPU", 0) // (num_workers * cpus_per_worker))
    return min(groups, int(total.get("GPU", 0) // num_workers)) if use_gpu else groups


def inventory() -> tuple[int, dict[str, float]]:
    """The number of living nodes of the cluster, and its resources by name."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(node["Alive"] for node in nodes), dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def on_each_node(look: Callable[[], Any], *, num_gpus: int, seconds: float) -> dict[str, Any]:
    """What a function returns on every living node, by its address; an exception instead if it failed there.

    Args:
        look: Takes no CPU, so that it runs beside jobs.
        num_gpus: GPUs that it holds; nodes with fewer are left out.
        seconds: How long to wait for all; a node that is not done then has a ``TimeoutError``.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(look)
    asked: dict[str, Any] = {}
    for node in alive:
        if node["Resources"].get("GPU", 0) >= num_gpus:
            name = node["NodeManagerAddress"]
            name = name if name not in asked else f"{name} ({node['NodeID'][:8]})"
            place = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            asked[name] = task.options(scheduling_strategy=place).remote()
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds) if asked else ([], [])
    return {name: _outcome(ref, ref in done, seconds) for name, ref in asked.items()}


def _outcome(ref: Any, is_done: bool, seconds: float) -> Any:
    import ray

    if not is_done:
        ray.cancel(ref, force=True)
        return TimeoutError(f"no answer in {seconds:.0f} s")
    try:
        return ray.get(ref)
    except Exception as error:
        return getattr(error, "cause", None) or error


def dashboard() -> str | None:
    """The address of the joined cluster's dashboard; None if it has none."""
    from ray._private.worker import get_dashboard_url

    address = get_dashboard_url()  # type: ignore[no-untyped-call]
    return f"http://{address}" if address else None


def admits_stranger(address: str) -> bool:
    """Whether a process with a token that nobody made joins the cluster."""
    hidden = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": address}
    code = "import ray; ray.init(log_to_driver=False); ray.cluster_resources()"
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def token() -> str | None:
    """The token that a client of this process's environment shows, found where Ray looks for it."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def require(*, num_workers: int, cpus_per_worker: int, use_gpu: bool) -> None:
    """Refuses GPUs that this machine does not have, if it is the whole cluster; a joined cluster may still grow.

    Raises:
        UserError: ``--use-gpu`` on a machine without enough GPUs.
    """
    if not use_gpu or not is_private():
        return
    if not fits(num_workers=num_workers, cpus_per_worker=cpus_per_worker, use_gpu=True):
        raise UserError(
            f"--use-gpu: this machine has not {num_workers} GPUs, one for each worker; "
            "give a smaller --num-workers, or leave --use-gpu out to use CPUs"
        )


def _env_vars() -> dict[str, str]:
    forwarded = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
    for name in _FORWARDED_URIS:
        value = os.environ.get(name)
        if value and urlsplit(value).password is None:
            forwarded[name] = value
    wanted = {**forwarded, **{name: os.environ[name] for name in _QUIET}}
    if not is_private():
        wanted[_JOINED] = "1"
    # Ray refuses a variable that the submitted job's own runtime environment already gives.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in wanted.items() if name not in given}
