"""Which network interface workers talk over: the one with the address by which Ray knows their node.

Gloo takes the interface that the host name resolves to, which on many machines is the loopback or a container's bridge;
workers on other nodes cannot reach it then.
"""

import os
from dataclasses import dataclass
from typing import Any, cast

import psutil
import ray.util
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

__all__ = ["NodeAddressTorchConfig", "interface_of"]

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class NodeAddressTorchConfig(TorchConfig):
    """Ray Train's process group, over the node's own interface; ``GLOO_SOCKET_IFNAME`` on a node overrides it."""

    @property
    def backend_cls(self) -> "type[_Backend]":
        """What Ray Train calls to set up workers."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, cast(TorchConfig, backend_config))


def _choose_interface() -> None:
    name = interface_of(cast(Any, ray.util).get_node_ip_address())
    if name is not None:
        os.environ.setdefault(_GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has an IP address, if there is one."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == address for entry in entries)), None)
