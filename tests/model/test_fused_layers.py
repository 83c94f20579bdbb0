"""Which layers are one operation, and that a trunk with them is the trunk it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.llama import modeling_llama as llama

from llm2vec_ds.model import fused_layers
from llm2vec_ds.model.fused_layers import fuse_layers
from tests.support.model_types import TYPES, build

PARTS = {
    "llama": {"RMSNorm": 9, "SwiGLU": 4, "rotary embedding": 4},
    "mistral": {"RMSNorm": 9, "SwiGLU": 4, "rotary embedding": 4},
    "qwen2": {"RMSNorm": 9, "SwiGLU": 4, "rotary embedding": 4},
    "qwen3": {"RMSNorm": 17, "SwiGLU": 4, "rotary embedding": 4},
    "gemma2": {"RMSNorm + 1": 17, "GeGLU": 4, "rotary embedding": 4},
    "gemma3_text": {"RMSNorm + 1": 25, "GeGLU": 4, "rotary embedding": 4},
    "cohere": {},  # pairs of neighbours are rotated, LayerNorm
}


@pytest.mark.parametrize("model_type", PARTS)
def test_known_layers_are_fused(model_type: str) -> None:
    found = fuse_layers(build(model_type).base_model)
    if model_type == "cohere":
        assert "rotary embedding" not in found
        assert "RMSNorm" not in found
    else:
        assert found == PARTS[model_type]


@pytest.mark.parametrize("model_type", TYPES)
def test_outputs_and_gradients_stay(model_type: str) -> None:
    """In fp32: transformers computes norms in it whatever the dtype."""
    plain = build(model_type).base_model.train()
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    ids = torch.randint(3, 400, (2, 11), generator=torch.Generator().manual_seed(3))
    results = []
    for trunk in (plain, fused):
        torch.manual_seed(5)  # one type has dropout
        out = trunk(ids, use_cache=False).last_hidden_state
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
        named = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
        results.append({"out": out.detach(), **named})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=2e-5 * scale, msg=name)


def test_another_formula_under_a_known_name_is_left_alone() -> None:
    class LlamaRMSNorm(llama.LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(4).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    assert not fuse_layers(nn.Sequential(LlamaRMSNorm(4)))


def test_gemmas_norm_counts_with_the_method_that_it_calls() -> None:
    class GemmaRMSNorm(gemma.GemmaRMSNorm):
        def _norm(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + self.eps)

    assert not fuse_layers(nn.Sequential(GemmaRMSNorm(4)))
    assert fuse_layers(nn.Sequential(gemma.GemmaRMSNorm(4))) == {"RMSNorm + 1": 1}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_gemmas_norm_rounds_once(weight_dtype: torch.dtype) -> None:
    """bf16 rows: to the last bit what transformers gives, whatever the weight's dtype."""
    torch.manual_seed(0)
    plain = gemma.GemmaRMSNorm(24)
    plain.weight.data = torch.randn(24).to(weight_dtype)
    fused = copy.deepcopy(plain)
    fuse_layers(nn.Sequential(fused))
    x = torch.randn(50, 24).bfloat16()
    found, expected = fused(x), plain(x)
    assert found.dtype == torch.bfloat16
    assert (found != expected).float().mean() < 0.01  # rows' sums are added up in another order


def test_another_activation_is_left_alone() -> None:
    mlp = llama.LlamaMLP(llama.LlamaConfig(hidden_size=32, intermediate_size=8, hidden_act="gelu"))
    assert not fuse_layers(nn.Sequential(mlp))


def test_another_rotation_under_a_known_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that it calls counts too."""
    trunk: Any = build("mistral").base_model
    from transformers.models.mistral import modeling_mistral

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    monkeypatch.setattr(modeling_mistral, "rotate_half", rotate_half)
    assert "rotary embedding" not in fuse_layers(trunk)


def test_classes_keep_their_names_and_other_devices_their_code() -> None:
    trunk: Any = build("llama", attention="sdpa").base_model
    expected = [type(module).__name__ for module in trunk.modules()]
    fuse_layers(trunk)
    assert [type(module).__name__ for module in trunk.modules()] == expected
    assert isinstance(trunk.norm, llama.LlamaRMSNorm)


def test_other_devices_compute_what_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build("llama", attention="sdpa").base_model
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    monkeypatch.setattr(fused_layers, "runs_on", lambda device: False)
    ids = torch.arange(3, 20)[None]
    expected, found = (trunk(ids, use_cache=False).last_hidden_state for trunk in (plain, fused))
    assert torch.equal(expected, found)
