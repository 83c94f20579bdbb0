"""Addresses and interfaces of this host, without resolving names: on clusters they often lead nowhere. And
the hub of models and data, which is not asked again and again where it cannot be reached."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import urllib.request
from typing import Any

from llm2vec_ds.errors import UserError

log = logging.getLogger(__name__)

CONNECT_S = 5.0
"""Seconds in which a server of the hub has to take a connection."""

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


def give_up_on_unreachable_hub() -> None:
    """From now on a server of the hub that takes no connection counts as if offline mode were on: what is in
    the cache is used, and all else fails at once. huggingface_hub alone tries six times for each file, in 23
    seconds.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils._http import default_client_factory

    faults: dict[str, str] = {}

    def check(request: Any) -> None:
        host, port = request.url.host, request.url.port or (443 if request.url.scheme == "https" else 80)
        if host not in faults:
            faults[host] = "" if _has_proxy(request.url.scheme) else _fault_of_connecting(host, port)
            if faults[host]:
                log.info("%s cannot be reached (%s): only what is cached is used", host, faults[host])
        if faults[host]:
            raise OfflineModeIsEnabled(f"{host} cannot be reached: {faults[host]}")

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], check]}
        return made

    set_client_factory(client)


def _has_proxy(scheme: str) -> bool:
    """The name then need not resolve here."""
    proxies = urllib.request.getproxies()
    return scheme in proxies or "all" in proxies


def _fault_of_connecting(host: str, port: int) -> str:
    """Why no connection can be made; empty where one can."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""


if __name__ == "__main__":
    print(own_address(os.environ.get("LLM2VEC_DS_INTERFACE")))
