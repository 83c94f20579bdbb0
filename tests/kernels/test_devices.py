"""Where kernels run in Triton, and what is said where they do not."""

from __future__ import annotations

import pytest
import torch
from llm2vec_kernels import devices
from llm2vec_kernels.devices import runs_triton, triton_refusal

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("device", "capability", "environment", "reason"),
    [
        ("cuda", (8, 0), {}, None),
        ("cuda", (9, 0), {"LLM2VEC_TRITON": "1"}, None),
        ("cuda", (9, 0), {"LLM2VEC_TRITON": "0"}, "Triton is turned off by LLM2VEC_TRITON=0"),
        ("cuda:1", (7, 5), {}, "cuda:1 has compute capability 7.5, below the 8.0"),
        ("cpu", (9, 0), {}, "Triton needs a CUDA device, not cpu"),
    ],
)
def test_needs_a_card_of_capability_8_and_no_objection(
    device: str,
    capability: tuple[int, int],
    environment: dict[str, str],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLM2VEC_TRITON", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    refusal = triton_refusal(torch.device(device))
    assert runs_triton(torch.device(device)) is (reason is None)
    assert (refusal is None) is (reason is None)
    assert (reason or "") in (refusal or "")


def test_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert triton_refusal(torch.device("cuda")) == "package triton is not installed"


def test_the_interpreter_counts_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM2VEC_TRITON", raising=False)
    cpu = torch.device("cpu")
    for interpreted in (True, False):
        monkeypatch.setattr(devices, "_is_interpreted", lambda interpreted=interpreted: interpreted)
        devices._refusal.cache_clear()
        assert triton_refusal(cpu) is not None
        assert (triton_refusal(cpu, interpreter_too=True) is None) is interpreted
    monkeypatch.setattr(devices, "_is_interpreted", lambda: True)
    monkeypatch.setenv("LLM2VEC_TRITON", "0")
    devices._refusal.cache_clear()
    assert "LLM2VEC_TRITON=0" in str(triton_refusal(cpu, interpreter_too=True))
