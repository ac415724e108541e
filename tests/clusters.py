"""Ray clusters for tests: nodes that can be killed one by one, each a tree of processes that this process started."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
"""``ray`` of this environment, whatever the PATH says."""

FAST_DEATHS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "5",
}
"""A node that does not answer is declared dead after about 25 s instead of a minute or more.

Not sooner: on a busy machine a healthy one may not answer for seconds.
"""


@dataclass(kw_only=True)
class Node:
    """One machine of a cluster: ``ray start --block`` and everything below it."""

    process: "subprocess.Popen[bytes]"

    def ray_id(self) -> str:
        """Ray's id of the node, from the command line of its raylet."""
        words = [word for process in tree(self.process.pid) for word in process.cmdline()]
        return next(word.partition("=")[2] for word in words if word.startswith("--node_id="))

    def kill(self) -> None:
        """Ends all of it at once, as a power cut does."""
        kill_tree(self.process.pid)
        self.process.wait(30)


@dataclass(kw_only=True)
class Cluster:
    """A head and further nodes on this machine, with token authentication."""

    folder: Path
    port: int
    environment: dict[str, str]
    """What a client of the cluster needs."""
    nodes: list[Node] = field(default_factory=list)
    dashboard_port: int | None = None
    """Where jobs are submitted; None if the cluster takes none."""

    def add_node(self, *, num_cpus: int, head: bool = False) -> Node:
        """Starts a node; returns at once unless it is the head."""
        where = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}"] if head else []
        where += self._dashboard() if head else [f"--address=127.0.0.1:{self.port}"]
        command = [*RAY, "start", "--block", "--node-ip-address=127.0.0.1", *where, f"--num-cpus={num_cpus}"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats", "--include-log-monitor=false"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
        with (self.folder / "nodes.log").open("ab") as log:
            process = subprocess.Popen(
                command, env={**environment, **self.environment, "RAY_ADDRESS": ""}, stdout=log, stderr=log
            )
        node = Node(process=process)
        self.nodes.append(node)
        if head:
            _wait_for_port(self.port, process)
        return node

    def _dashboard(self) -> list[str]:
        if self.dashboard_port is None:
            return ["--include-dashboard=false"]
        where = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"]
        return [*where, f"--dashboard-agent-listen-port={free_port()}"]  # jobs are started by the agent

    def announce_end(self, node: Node, *, seconds: int) -> None:
        """Tells Ray, as a cloud's notice does, that a node will be taken away."""
        command = [*RAY, "drain-node", "--address", f"127.0.0.1:{self.port}", "--node-id", node.ray_id()]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env={**os.environ, **self.environment}, check=True, capture_output=True, timeout=60)

    def workers(self) -> list[psutil.Process]:
        """The processes in which Ray Train's workers run, of all nodes."""
        return [process for node in self.nodes for process in tree(node.process.pid) if _is_train_worker(process)]


@contextmanager
def cluster(
    *, head_cpus: int, dashboard: bool = False, token: bool = True, preemption: bool = True
) -> Iterator[Cluster]:
    """Starts a head, one that takes jobs if there is a ``dashboard``; ends all nodes at the end.

    Args:
        head_cpus: CPUs that Ray believes the head to have.
        dashboard: Whether it takes jobs.
        token: Whether it asks for a token.
        preemption: Whether each training job watches for nodes that are announced to end, which takes it seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short sockets
        port = free_port()
        # The token of this process: Ray reads it once, and a test may join the cluster itself.
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
        environment = {
            **(secret if token else {"RAY_AUTH_MODE": "disabled"}),
            **FAST_DEATHS,
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            **({} if preemption else {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}),
        }
        new = Cluster(folder=Path(folder), port=port, environment=environment)
        new.dashboard_port = free_port() if dashboard else None
        try:
            head = new.add_node(num_cpus=head_cpus, head=True)
            if new.dashboard_port is not None:
                _wait_for_port(new.dashboard_port, head.process)
            yield new
        finally:
            for node in reversed(new.nodes):
                node.kill()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all its descendants, parents first, so that none is replaced."""
    for process in tree(pid):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def _is_train_worker(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::RayTrainW") or "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]", seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the head did not come up")
