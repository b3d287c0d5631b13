"""By which address and interface this machine is reached."""

import os
import socket
from typing import Any

import pytest
import torch.distributed as dist

from gtpo_megatron import control, network
from gtpo_megatron.config import ParallelConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform

platform.install()

from gtpo_megatron.policy import model  # noqa: E402

V4, V6 = socket.AF_INET, socket.AF_INET6


class Routes:
    """Sockets of a machine that has the route of one family alone."""

    def __init__(self, family: int, own: str) -> None:
        self.family, self.own, self.closed = family, own, 0

    def __call__(self, family: int, *_: Any) -> "Routes":
        self.asked = family
        return self

    def __enter__(self) -> "Routes":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def connect(self, _: Any) -> None:
        if self.asked != self.family:
            raise OSError(101, "Network is unreachable")

    def getsockname(self) -> tuple[str, int]:
        return self.own, 0


def names(monkeypatch: pytest.MonkeyPatch, *families: int) -> None:
    answers = [(family, socket.SOCK_DGRAM, 17, "", ("address", 9)) for family in families]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)


@pytest.mark.parametrize(
    ("families", "route", "own"),
    [((V4,), V4, "10.0.0.7"), ((V6,), V6, "fd00::7"), ((V6, V4), V4, "10.0.0.7"), ((V6, V4), V6, "fd00::7")],
)
def test_the_address_is_that_of_the_family_with_a_route(
    families: tuple[int, ...], route: int, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = Routes(route, own)
    names(monkeypatch, *families)
    monkeypatch.setattr(socket, "socket", routes)
    assert network.own_address("node7") == own
    assert routes.closed == 1 + families.index(route)


def test_a_host_without_route_or_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        names(patch, V6, V4)
        patch.setattr(socket, "socket", Routes(0, ""))
        with pytest.raises(UserError, match="node7: this machine does not reach it: Network is unreachable"):
            network.own_address("node7")

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="node7: this machine does not reach it: Name or service not known"):
        network.own_address("node7")


def test_this_machine_reaches_itself_by_loopback() -> None:
    assert network.own_address("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("192.0.2.1") is None  # of no machine


def groups_made(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The interface that gloo is given for each group of a run."""
    made: list[str | None] = []

    def make(*_: Any, **__: Any) -> None:
        made.append(os.environ.get(network.GLOO_INTERFACE))

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", make)
    monkeypatch.setattr(control, "group", make)
    monkeypatch.setattr(platform.rollcall, "answer_calls", lambda: None)
    monkeypatch.setattr(model.parallel_state, "initialize_model_parallel", make)
    monkeypatch.setattr(model, "model_parallel_cuda_manual_seed", lambda _: None)
    platform.init_process_group()
    model.initialize_parallel(ParallelConfig(), seed=0)
    return made


def test_gloo_takes_the_interface_that_reaches_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", network.GLOO_INTERFACE):
        monkeypatch.delenv(name, raising=False)
    assert groups_made(monkeypatch) == ["lo"] * 3
    assert network.GLOO_INTERFACE not in os.environ  # a server that is started later finds its own

    world = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "own_address", lambda host: {"node1": "10.0.0.7"}[host])
    monkeypatch.setattr(network, "interface_of", lambda address: {"10.0.0.7": "ib0"}[address])
    assert groups_made(monkeypatch) == ["ib0"] * 3
    # a master that calls itself by loopback: the others could not reach it there
    monkeypatch.setattr(network, "own_address", lambda host: "127.0.0.1")
    assert groups_made(monkeypatch) == [None] * 3
    monkeypatch.setenv(network.GLOO_INTERFACE, "eth9")
    assert groups_made(monkeypatch) == ["eth9"] * 3
