"""Addresses and interfaces of this host, without resolving names: on clusters they often lead nowhere."""

from __future__ import annotations

import os
import socket
import struct
import sys

from llm2vec_ds.errors import UserError

SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface (netdevice(7))."""


def interfaces() -> dict[str, str]:
    """IPv4 address of each interface that has one; empty where the system is not Linux."""
    if not sys.platform.startswith("linux"):
        return {}
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
            except OSError:  # no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def own_address(interface: str | None = None) -> str:
    """IPv4 address at which other nodes reach this one.

    Args:
        interface: its name where the site knows it; None: that of the default route, else the first that is
            not the loopback.

    Raises:
        UserError: there is no such interface, or it has no IPv4 address.
    """
    addresses = interfaces()
    if interface is not None:
        if interface not in addresses:
            raise UserError(
                f"no network interface {interface!r} with an IPv4 address on {socket.gethostname()}: "
                f"choose one of {', '.join(addresses) or 'none'}"
            )
        return addresses[interface]
    if address := _source_address("198.18.0.1"):  # a test network: stands for "anywhere"
        return address
    outward = [address for address in addresses.values() if not address.startswith("127.")]
    return outward[0] if outward else "127.0.0.1"


def interface_towards(address: str) -> str | None:
    """The interface from which `address` is reached; None if that cannot be told."""
    source = _source_address(address)
    return next((name for name, own in interfaces().items() if own == source), None)


def _source_address(address: str) -> str | None:
    """Where packets to `address` would leave from; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own: str = probe.getsockname()[0]
            return own
    except OSError:
        return None


if __name__ == "__main__":
    print(own_address(os.environ.get("LLM2VEC_DS_INTERFACE")))
