"""Linear layers by the faster library of products, against PyTorch's in fp64; and what stays PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llm2vec_kernels import products
from torch import nn

from llm2vec_ds.model.adapters import add_lora, n_fused
from llm2vec_ds.model.cpu_linear import CpuLinear, use_fast_products
from llm2vec_ds.recipe.sections import AdapterConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LLM2VEC_ONEDNN", "1")
    monkeypatch.setattr(products, "LEAST_FOR_ONEDNN", 1)
    products.cpu_products.cache_clear()
    yield
    products.cpu_products.cache_clear()


@pytest.fixture
def n_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each product of oneDNN's."""
    calls: list[int] = []
    plain = products._onednn

    def counting(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(*arguments)

    monkeypatch.setattr(products, "_onednn", counting)
    return calls


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 20, bias=bias, dtype=dtype))
    use_fast_products(made, CPU)
    return made


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", ["nothing", "the input", "the layer", "both"])
def test_values_and_gradients_are_pytorchs(
    shape: tuple[int, ...], bias: bool, trains: str, n_products: list[int]
) -> None:
    model = layer(bias).requires_grad_(trains in ("the layer", "both"))
    exact = nn.Sequential(nn.Linear(12, 20, bias=bias)).requires_grad_(trains in ("the layer", "both"))
    exact.load_state_dict(model.state_dict())
    exact.double()
    x = torch.randn(shape, requires_grad=trains in ("the input", "both"))
    x_exact = x.detach().double().requires_grad_(x.requires_grad)
    found, expected = model(x), exact(x_exact)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if trains == "nothing":
        assert not found.requires_grad
        assert len(n_products) == (1 if x.numel() else 0)
        return
    slope = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    (found * slope.float()).sum().backward()
    (expected * slope).sum().backward()
    pairs = zip([x, *model.parameters()], [x_exact, *exact.parameters()], strict=True)
    for ours, theirs in pairs:
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_small_products_are_pytorchs(n_products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_FOR_ONEDNN", 5 * 12 * 20 + 1)
    layer()(torch.randn(5, 12)).sum().backward()
    assert not n_products


def test_compilers_and_autocast_see_pytorchs_layer(n_products: list[int]) -> None:
    model, x = layer(), torch.randn(5, 12)
    torch.compile(model, backend="eager", fullgraph=True)(x)
    exported = torch.export.export(model, (x,))
    torch.jit.trace(model, x, check_trace=False)
    with torch.autocast("cpu"):
        assert model(x).dtype == torch.bfloat16
    assert not n_products
    assert "mkldnn" not in str(exported.graph)


def test_other_dtypes_and_partitioned_weights_are_pytorchs(n_products: list[int]) -> None:
    layer().double()(torch.randn(5, 12, dtype=torch.float64))
    partitioned = layer()
    partitioned[0].weight.ds_id = 0  # type: ignore[index,union-attr]
    partitioned(torch.randn(5, 12))
    assert not n_products


def test_where_onednn_is_not_chosen_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(layer(dtype=torch.bfloat16)[0]) is nn.Linear  # type: ignore[index]
    monkeypatch.setenv("LLM2VEC_ONEDNN", "0")
    products.cpu_products.cache_clear()
    assert type(layer()[0]) is nn.Linear  # type: ignore[index]


def test_elsewhere_than_on_a_cpu_layers_stay() -> None:
    made = nn.Sequential(nn.Linear(12, 20))
    use_fast_products(made, torch.device("cuda"))
    assert type(made[0]) is nn.Linear


def test_an_adapter_over_it_is_one_operation(n_products: list[int]) -> None:
    model = layer()
    assert type(model[0]) is CpuLinear  # type: ignore[index]
    add_lora(model, AdapterConfig(rank=3, zero_init=False))
    assert n_fused(model) == 1
    model(torch.randn(4, 12)).square().sum().backward()
    assert len(n_products) == 5  # x·Wᵀ, x·Aᵀ; in backward three, as x needs no gradient: d·B, and of A and B
