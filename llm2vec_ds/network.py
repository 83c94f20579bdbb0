"""Addresses and interfaces of this host, and the model hub when it is unreachable.

Addresses are found without resolving host names, because on clusters these often lead nowhere.
"""

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
"""Seconds within which a server of the hub must accept a connection."""

SIOCGIFADDR = 0x8915
"""Linux request for the IPv4 address of an interface (netdevice(7))."""


def interfaces() -> dict[str, str]:
    """Returns the IPv4 address of each interface that has one. On other systems than Linux: nothing."""
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
    """Returns the IPv4 address at which other nodes reach this one.

    Args:
        interface: name of the interface, if the user set one. None: the interface of the default route, else
            the first one that is not the loopback.

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
    if address := _source_address("198.18.0.1"):  # reserved for tests; here it means "anywhere outside"
        return address
    outward = [address for address in addresses.values() if not address.startswith("127.")]
    return outward[0] if outward else "127.0.0.1"


def interface_towards(address: str) -> str | None:
    """Returns the interface that leads to `address`, or None if it is unknown."""
    source = _source_address(address)
    return next((name for name, own in interfaces().items() if own == source), None)


def _source_address(address: str) -> str | None:
    """Returns the own address that packets to `address` would carry. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own: str = probe.getsockname()[0]
            return own
    except OSError:
        return None


def give_up_on_unreachable_hub() -> None:
    """Makes an unreachable hub fail at once. Cached files are then used, as in offline mode.

    Without this, huggingface_hub tries six times for each file, which takes 23 seconds.
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
                log.info("%s cannot be reached (%s): using cached files only", host, faults[host])
        if faults[host]:
            raise OfflineModeIsEnabled(f"{host} cannot be reached: {faults[host]}")

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], check]}
        return made

    set_client_factory(client)


def _has_proxy(scheme: str) -> bool:
    """Returns whether a proxy serves this scheme. The hub's name then need not resolve here."""
    proxies = urllib.request.getproxies()
    return scheme in proxies or "all" in proxies


def _fault_of_connecting(host: str, port: int) -> str:
    """Returns why no connection is possible, or an empty string if one is."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""


if __name__ == "__main__":
    try:
        print(own_address(os.environ.get("LLM2VEC_DS_INTERFACE")))
    except UserError as error:
        sys.exit(f"llm2vec-ds: error: {error}")
