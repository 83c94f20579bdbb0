"""Linear layers by the faster product where no graph is asked for, PyTorch's own elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llm2vec_kernels import cpu_products as products
from torch import nn

from llm2vec_ds.config import AdapterConfig
from llm2vec_ds.model.adapters import add_lora, n_fused
from llm2vec_ds.model.cpu_linear import CpuLinear, use_fast_products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LLM2VEC_ONEDNN", "1")
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


def layer(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 20, bias=bias))
    use_fast_products(made, CPU)
    return made


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_graph_it_is_onednns(shape: tuple[int, ...], bias: bool, n_products: list[int]) -> None:
    model, x = layer(bias), torch.randn(shape)
    with torch.no_grad():
        found = model(x)
    expected = model(x)  # with a graph
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(n_products) == 1


def test_training_is_pytorchs(n_products: list[int]) -> None:
    model, x = layer(), torch.randn(5, 12, requires_grad=True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in [x, *model.parameters()])
    assert not n_products


def test_other_dtypes_are_pytorchs(n_products: list[int]) -> None:
    with torch.no_grad():
        layer().double()(torch.randn(5, 12, dtype=torch.float64))
    assert not n_products


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
