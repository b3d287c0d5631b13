"""By which address servers reach the trainer."""

import socket

import pytest

from gtpo_megatron import network
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang.weights import broadcast
from gtpo_megatron.rollout.sglang.weights.broadcast import Target


def test_servers_on_this_machine_use_the_loopback() -> None:
    assert (
        broadcast._own_address([Target("http://127.0.0.1:30000", 1), Target("http://[::1]:30000", 1)])
        == "127.0.0.1"
    )


def test_a_server_elsewhere_is_asked_for_by_name_or_by_either_kind_of_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"node7": "10.0.0.1", "fd00::7": "fd00::1"}
    monkeypatch.setattr(broadcast, "own_address", lambda host: ways[host])
    for url, own in (("http://node7:30000", "10.0.0.1"), ("http://[fd00::7]:30000", "fd00::1")):
        assert broadcast._own_address([Target("http://127.0.0.1:30000", 1), Target(url, 2)]) == own


def test_a_server_to_which_there_is_no_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(network.socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="node7: this machine does not reach it"):
        broadcast._own_address([Target("http://node7:30000", 1)])
