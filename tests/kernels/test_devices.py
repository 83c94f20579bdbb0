"""Where kernels run in Triton."""

from __future__ import annotations

import pytest
import torch
from llm2vec_kernels.devices import runs_triton

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("device", "capability", "environment", "expected"),
    [
        ("cuda", (8, 0), {}, True),
        ("cuda", (9, 0), {"LLM2VEC_TRITON": "1"}, True),
        ("cuda", (9, 0), {"LLM2VEC_TRITON": "0"}, False),
        ("cuda", (7, 5), {}, False),
        ("cpu", (9, 0), {}, False),
    ],
)
def test_needs_a_card_of_capability_8_and_no_objection(
    device: str,
    capability: tuple[int, int],
    environment: dict[str, str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLM2VEC_TRITON", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runs_triton.__wrapped__(torch.device(device)) is expected
