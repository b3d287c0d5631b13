"""This machine on its network: the address and the interface by which another machine is reached."""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from gtpo_megatron.errors import UserError

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_PORT = 9  # any: connecting a datagram socket looks up the route, and sends nothing


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(host: str) -> str:
    """The address of this machine, IPv4 or IPv6, by which `host` (a name or an address) is reached.

    Raises:
        UserError: the name is unknown, or there is no route.
    """
    try:
        found = socket.getaddrinfo(host, _PORT, type=socket.SOCK_DGRAM)
        for place, (family, kind, protocol, _, address) in enumerate(found, start=1):
            with socket.socket(family, kind, protocol) as probe:
                try:
                    probe.connect(address)
                except OSError:
                    if place == len(found):
                        raise
                else:
                    return str(probe.getsockname()[0])
        raise OSError("it has no address")
    except OSError as error:
        raise UserError(f"{host}: this machine does not reach it: {error.strerror or error}") from error


def interface_of(address: str) -> str | None:
    """The name of the network interface that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address.partition("%")[0] for entry in addresses):
            return name
    return None


@contextmanager
def gloo_towards(host: str) -> Iterator[None]:
    """Process groups of gloo that are made within talk by the interface that reaches `host`, unless the user has set one.

    By itself gloo takes what the machine's name resolves to, which on many is an address that others do not reach, or none.
    """
    name = None if os.environ.get(GLOO_INTERFACE) else interface_of(own_address(host))
    if name is None:
        yield
        return
    os.environ[GLOO_INTERFACE] = name
    try:
        yield
    finally:
        del os.environ[GLOO_INTERFACE]
