"""One operation for a linear layer and its adapter, against peft's own forward in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from llm2vec_kernels import products
from llm2vec_kernels.products import cpu_products
from llm2vec_kernels.row_ops.dropout import Masks, drop
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
    for layer in model.modules():
        if hasattr(layer, "masks"):
            type(layer).masks = None
    x = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and (g.any() or not x.numel()) for g in gradients)
    return [out, *([x.grad] if x.requires_grad else []), *gradients]  # type: ignore[list-item]


def as_peft_does(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same parameters under peft's forward, with the masks that ours draws, as factors."""

    class Factors(nn.Module):
        """Of inputs in the order of their layers."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if Factors.masks is None:
                Factors.masks = Masks(self.p)
            ones = torch.ones(x.shape, dtype=dtype)
            return x * drop(ones, self.p, Factors.masks.next_for(ones)) / (1 - self.p)

        masks: Masks | None = None
        p: float

    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.forward = PeftLoraLinear.forward.__get__(layer)  # type: ignore[method-assign]
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = Factors()
                    layer.lora_dropout[name].p = dropout.p  # type: ignore[assignment]
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
    monkeypatch.setattr(products, "LEAST_FOR_ONEDNN", 1)
    cpu_products.cache_clear()
    try:
        model = with_adapters(bias=True, dropout=0.4)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        exact = outcome(as_peft_does(copy.deepcopy(model)), x)
        fused = outcome(model.float(), x.detach().float().requires_grad_())
    finally:
        cpu_products.cache_clear()
    for a, b in zip(fused, exact, strict=True):
        # Of the largest value: some are small differences of large ones.
        largest = float(b.detach().abs().max()) if b.numel() else 0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6 * largest)


def test_layers_that_read_one_tensor_share_its_mask() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(12, 12, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.first(x), self.second(x.view(x.shape)), self.third(x + 0)]

    model = Three()
    add_lora(model, AdapterConfig(rank=3, zero_init=False, dropout=0.4))
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:  # all the same, so that outputs tell masks
        layer.load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 12)
    first, second, third = model(x)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first, model(x)[0])  # the next pass draws again


def test_nothing_of_dropout_is_kept_but_where_it_strikes() -> None:
    model = with_adapters(dropout=0.05).float()
    kept: list[torch.Tensor] = []
    x = torch.randn(1000, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.wide(x)
    weights = {p.data_ptr() for p in model.parameters()}
    sizes = {t.numel() for t in kept if t.data_ptr() not in weights}
    assert sizes >= {3000, 12000}  # the adapter's inner result, and x itself
    (n_dropped,) = sizes - {3000, 12000}
    assert 400 < n_dropped < 800
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_gradcheck() -> None:
    model = with_adapters(dropout=0.0)
    assert torch.autograd.gradcheck(model, torch.randn(4, 12, dtype=torch.float64, requires_grad=True))


def test_operation_keeps_torchs_rules() -> None:
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((5, 12), (3, 12), (20, 3)))
    mask = Masks(0.4).next_for(x)
    dropout = (drop(x.detach(), 0.4, mask), mask, 0.4)
    arguments = (x, torch.randn(20, 12), torch.randn(20), a, b, 2.0)
    for more in ((), dropout):
        torch.library.opcheck(torch.ops.llm2vec_ds.lora_linear.default, (*arguments, *more))


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


def test_another_adapter_of_the_same_name_is_seen() -> None:
    model = with_adapters()
    x = torch.randn(4, 12, dtype=torch.float64)
    first = model(x)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.delete_adapter("default")
    del model.peft_config
    add_lora(model, AdapterConfig(rank=5, zero_init=False, dropout=0.0))
    model.double()
    again = model(x)
    assert not torch.equal(again, first)
    torch.testing.assert_close(again, as_peft_does(model)(x), rtol=1e-12, atol=1e-12)


def test_a_changed_dropout_is_seen() -> None:
    model = with_adapters(dropout=0.4)
    x = torch.randn(400, 12, dtype=torch.float64)
    dropped = model(x)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_dropout["default"].p = 0.0
    assert not torch.equal(model(x), dropped)
    assert torch.equal(model(x), model.eval()(x))


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
