"""Addresses without names: interfaces of this host and which of them leads where."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import http_backoff
from huggingface_hub.utils._http import default_client_factory

from llm2vec_ds.errors import UserError
from llm2vec_ds.network import give_up_on_unreachable_hub, interface_towards, interfaces, own_address
from tests.support.in_process import error_line, run
from tests.support.ports import free_port

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


@pytest.fixture
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits, and no proxy stands between."""

    def no_sleep(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", no_sleep)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    yield
    set_client_factory(default_client_factory)


@pytest.mark.usefixtures("_online")
def test_a_hub_that_takes_no_connection_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    give_up_on_unreachable_hub()
    url = f"http://127.0.0.1:{free_port()}/owner/name"
    for _ in range(2):
        with pytest.raises(OfflineModeIsEnabled, match=r"127\.0\.0\.1 cannot be reached: Connection refused"):
            http_backoff("HEAD", url)
    assert caplog.text.count("127.0.0.1 cannot be reached") == 1


@pytest.mark.usefixtures("_online")
def test_a_hub_that_answers_is_asked_as_ever() -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_: object) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        give_up_on_unreachable_hub()
        assert get_session().get(f"http://127.0.0.1:{server.server_port}/").text == "here"
        server.shutdown()


@pytest.mark.usefixtures("_online")
@pytest.mark.parametrize(
    ("option", "line"),
    [
        (("--model", "no/such"), "model 'no/such' cannot be loaded: there is no such folder, and the hub"),
        (("--input", "hub:no/such"), "hub data set hub:no/such cannot be read"),
    ],
)
def test_without_network_a_hub_name_costs_one_line_at_once(
    option: tuple[str, str],
    line: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_name(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_name)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    (tmp_path / "a.txt").write_text("a text\n")
    usual = {"--model": str(tiny_model_dir), "--input": str(tmp_path / "a.txt")} | dict([option])
    words = [word for pair in usual.items() for word in pair]
    assert run(monkeypatch, "encode", *words, "--output", tmp_path / "v.npy") == 2
    assert error_line(capsys).startswith(line)
