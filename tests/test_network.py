"""Addresses without names: interfaces of this host and which of them leads where."""

from __future__ import annotations

import sys

import pytest

from llm2vec_ds.errors import UserError
from llm2vec_ds.network import interface_towards, interfaces, own_address

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="interfaces are read on Linux only"
)


def test_the_loopback_is_an_interface_and_leads_to_itself() -> None:
    assert interfaces()["lo"] == "127.0.0.1"
    assert own_address("lo") == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"


def test_own_address_is_that_of_an_interface_that_leads_there() -> None:
    address = own_address()
    assert address in interfaces().values()
    assert interfaces()[str(interface_towards(address))] == address


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match="'ib7'.* lo"):
        own_address("ib7")


def test_without_a_default_route_the_first_outward_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2vec_ds.network._source_address", lambda address: None)
    monkeypatch.setattr("llm2vec_ds.network.interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.7"})
    assert own_address() == "10.0.0.7"
    assert interface_towards("10.0.0.8") is None


def test_a_name_that_leads_nowhere_is_no_error() -> None:
    assert interface_towards("no-such-host.invalid") is None
