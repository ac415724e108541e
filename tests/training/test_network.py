import socket

import psutil

from pipeline.training.network import interface_of


def test_the_interface_is_the_one_that_has_the_address() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert interface_of(entry.address) == name


def test_an_address_of_another_machine_has_no_interface_here() -> None:
    assert interface_of("203.0.113.1") is None
