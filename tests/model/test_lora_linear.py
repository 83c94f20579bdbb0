"""One operation for a linear layer and its adapter, against peft's own forward in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from llm2vec_kernels.products import cpu_products
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

from llm2vec_ds.model.adapters import add_lora, n_fused
from llm2vec_ds.model.lora_linear import LoraLinear
from llm2vec_ds.recipe.sections import AdapterConfig


class TwoLayers(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 20, bias=bias)
        self.narrow = nn.Linear(20, 12, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.relu(self.wide(x)))


def with_adapters(bias: bool = False, **config: object) -> TwoLayers:
    torch.manual_seed(0)
    model = TwoLayers(bias)
    add_lora(model, AdapterConfig(rank=3, zero_init=False, **config))  # type: ignore[arg-type]
    return model.double()


def outcome(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients, dropout drawn anew."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and (g.any() or not x.numel()) for g in gradients)
    return [out, *([x.grad] if x.requires_grad else []), *gradients]  # type: ignore[list-item]


def as_peft_does(model: nn.Module) -> nn.Module:
    """The same parameters under peft's forward."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.forward = PeftLoraLinear.forward.__get__(layer)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("input_trains", [False, True])
def test_equals_peft(shape: tuple[int, ...], bias: bool, dropout: float, input_trains: bool) -> None:
    model = with_adapters(bias, dropout=dropout)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=input_trains)
    fused = outcome(model, x)
    plain = outcome(as_peft_does(model), x)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("onednn", ["0", "1"])
@pytest.mark.parametrize("shape", [(5, 12), (0, 12)], ids=str)
def test_either_library_of_products_gives_what_peft_does(
    onednn: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM2VEC_ONEDNN", onednn)
    cpu_products.cache_clear()
    try:
        model = with_adapters(bias=True, dropout=0.4)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        kept = [torch.rand(len(x), n) > 0.4 for n in (12, 20)]  # as dropout draws others for fp32
        masks = iter(2 * kept)
        monkeypatch.setattr(nn.Dropout, "forward", lambda self, y: y * next(masks) / 0.6)
        exact = outcome(as_peft_does(copy.deepcopy(model)), x)
        fused = outcome(model.float(), x.detach().float().requires_grad_())
    finally:
        cpu_products.cache_clear()
    for a, b in zip(fused, exact, strict=True):
        # Of the largest value: some are small differences of large ones.
        largest = float(b.detach().abs().max()) if b.numel() else 0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6 * largest)


def test_gradcheck() -> None:
    model = with_adapters(dropout=0.0)
    assert torch.autograd.gradcheck(model, torch.randn(4, 12, dtype=torch.float64, requires_grad=True))


def test_operation_keeps_torchs_rules() -> None:
    a = (torch.randn(5, 12), None, torch.randn(20, 12), torch.randn(20))
    adapter = (torch.randn(3, 12, requires_grad=True), torch.randn(20, 3, requires_grad=True), 2.0)
    torch.library.opcheck(torch.ops.llm2vec_ds.lora_linear.default, (*a, *adapter))


def calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many layers took the one operation."""
    from llm2vec_ds.model import lora_linear as module

    n_calls = 0
    operation = module.lora_linear

    def counting(*arguments: object) -> object:
        nonlocal n_calls
        n_calls += 1
        return operation(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "lora_linear", counting)
    model(torch.randn(4, 12, dtype=next(model.parameters()).dtype))
    return n_calls


def test_a_plain_adapter_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(with_adapters(), monkeypatch) == n_fused(with_adapters()) == 2


def _stacked(model: nn.Module) -> None:
    add_lora(model, AdapterConfig(rank=2, zero_init=False), name="second")
    model.double()


def _mixed_dtypes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _merged(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.merge()


def _trained_bias(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))


def _partitioned(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [_stacked, _mixed_dtypes, _merged, _partitioned, _trained_bias])
def test_what_it_does_not_do_is_left_to_peft(change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(bias=True)
    change(model)  # type: ignore[operator]
    assert n_fused(model) == 0
    assert calls(model, monkeypatch) == 0


def test_dora_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(with_adapters(variant="dora"), monkeypatch) == 0
