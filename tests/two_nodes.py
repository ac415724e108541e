"""Two machines in one: Ray nodes in network and process namespaces of their own, with a cable that can be pulled."""

import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clusters import FAST_DEATHS, RAY, kill_tree

_COUNT = itertools.count()
_PORT = 6390


def why_not() -> str | None:
    """Why no namespaces can be made here; None if they can."""
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} (apt packages iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"ddpm{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode == 0:
        done = subprocess.run(["unshare", "-pf", "--mount-proc", "true"], capture_output=True, text=True)
        subprocess.run(["ip", "netns", "del", name], check=True)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else None


class TwoNodes:
    """A bridge, two namespaces, and the Ray nodes in them: ``A`` is the head and holds the driver."""

    def __init__(self, folder: Path, *, dashboard: bool = False) -> None:
        self._id = f"{os.getpid() % 100_000}{next(_COUNT)}"  # names of links have at most 15 characters
        self._folder = folder
        self._dashboard = dashboard
        subnet = f"10.{70 + os.getpid() % 100}.{next(_COUNT) % 250}"
        self.address = {"A": f"{subnet}.1", "B": f"{subnet}.2"}
        self.outside = f"{subnet}.254"
        """This machine's own address on the bridge, for servers that the nodes talk to."""
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **FAST_DEATHS,
            "RAY_ADDRESS": f"{self.address['A']}:{_PORT}",
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def build_network(self) -> None:
        """Makes bridge, links and namespaces."""
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.outside}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for node, address in self.address.items():
            _ip("netns", "add", self._space(node))
            inner = self._inner(node)
            _ip("link", "add", self._outer(node), "type", "veth", "peer", "name", inner)
            _ip("link", "set", self._outer(node), "master", self._bridge)
            _ip("link", "set", self._outer(node), "up")
            _ip("link", "set", inner, "netns", self._space(node))
            inside = ("-n", self._space(node))
            _ip(*inside, "addr", "add", f"{address}/24", "dev", inner)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", inner, "up")

    def start_both(self) -> None:
        """Starts the head and, when it answers, the other node."""
        self.start("A")
        self._wait_for_head()
        self.start("B")

    def start(self, node: str) -> None:
        """Starts a Ray node, after an earlier one has ended."""
        if node in self._nodes:
            kill_tree(self._nodes[node].pid)
            self._nodes[node].wait(30)
        where = ["--head", f"--port={_PORT}", f"--temp-dir={self._folder}"]
        where += ["--dashboard-host=127.0.0.1"] if self._dashboard else ["--include-dashboard=false"]
        if node != "A":
            where = [f"--address={self.address['A']}:{_PORT}"]
        words = [*RAY, "start", "--block", *where, f"--node-ip-address={self.address[node]}", "--num-cpus=1"]
        words += ["--object-store-memory=100000000", "--disable-usage-stats"]
        # A process namespace of its own: nodes on one machine would find one another's processes.
        command = ["ip", "netns", "exec", self._space(node), "unshare", "-pf", "--mount-proc", "--kill-child", *words]
        environment = {**os.environ, **self.environment}
        environment.pop("RAY_ADDRESS")
        with (self._folder / f"{node}.log").open("ab") as log:
            self._nodes[node] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def cut(self) -> None:
        """Pulls the cable of B."""
        _ip("link", "set", self._outer("B"), "down")

    def join(self) -> None:
        """Plugs it in again. Ray ends a node that it has declared dead; like a supervisor this starts it again."""
        _ip("link", "set", self._outer("B"), "up")
        self.start("B")

    def popen(
        self, words: list[str], log: Path, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Starts a command beside the head, in its namespaces; with the nodes' environment unless told otherwise."""
        (head,) = _children(self._nodes["A"].pid)
        command = ["nsenter", "-t", str(head), "-n", "-p", "-m", f"--wd={cwd}", *words]
        given = self.environment if environment is None else environment
        with log.open("ab") as output:
            return subprocess.Popen(command, env={**os.environ, **given}, stdout=output, stderr=output)

    def controller_log(self, lines: int = 40) -> str:
        """What Ray Train's controllers said last: beside a run that hangs it tells what is waited for."""
        found = []
        for file in self._folder.glob("session_2*/logs/train/ray-train-sys-controller-*.log"):
            records = map(json.loads, file.read_text().splitlines()[-lines:])
            found += [f"{record['asctime']} {record['levelname']} {record['message']}" for record in records]
        return "\n".join(sorted(found)[-lines:])

    def remove(self) -> None:
        """Ends the nodes and takes everything away, links first: they outlive their namespace."""
        for process in self._nodes.values():
            kill_tree(process.pid)
            process.wait(30)
        for link in (self._outer("A"), self._outer("B"), self._bridge):
            subprocess.run(["ip", "link", "del", link], capture_output=True)
        for node in self.address:
            subprocess.run(["ip", "netns", "del", self._space(node)], capture_output=True)

    def _wait_for_head(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        inside = ["ip", "netns", "exec", self._space("A"), sys.executable, "-c"]
        wanted = {self.address["A"]: _PORT} | ({"127.0.0.1": 8265} if self._dashboard else {})
        for address, port in wanted.items():
            ask = f"import socket; socket.create_connection(('{address}', {port}), 2)"
            while subprocess.run([*inside, ask], capture_output=True).returncode:
                assert time.monotonic() < deadline, (self._folder / "A.log").read_text()
                time.sleep(0.5)
        time.sleep(3)

    @property
    def _bridge(self) -> str:
        return f"db{self._id}"

    def _space(self, node: str) -> str:
        return f"ddpm{self._id}{node}"

    def _outer(self, node: str) -> str:
        return f"dv{self._id}{node}"

    def _inner(self, node: str) -> str:
        return f"de{self._id}{node}"


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Builds both nodes and takes them away at the end, whatever happened."""
    with network() as nodes:
        nodes.start_both()
        yield nodes


@contextmanager
def network(*, dashboard: bool = False) -> Iterator[TwoNodes]:
    """Builds what is between two nodes that are still to be started; takes all of it away at the end."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short sockets
        nodes = TwoNodes(Path(folder), dashboard=dashboard)
        try:
            nodes.build_network()
            yield nodes
        finally:
            nodes.remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
