"""RMSNorm, SwiGLU and rotary embedding as one operation each, against the reference in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm2vec_kernels.row_ops import api as row_ops
from llm2vec_kernels.row_ops import reference

from tests.support.row_op_cases import CASES, EPS, outcome


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2vec_kernels.row_ops.cpu.ELEMENTS_PER_THREAD", 16)
    monkeypatch.setattr("llm2vec_kernels.row_ops.cpu.FEW_ELEMENTS", 0)


@pytest.fixture(params=["few rows", "chunks"])
def both_ways(request: pytest.FixtureRequest) -> None:
    if request.param == "chunks":
        request.getfixturevalue("small_chunks")


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25)
@given(n=st.integers(0, 23), width=st.integers(1, 20))
def test_equals_the_formula(name: str, n: int, width: int) -> None:
    ours, formula, inputs_of, n_differentiable = CASES[name]
    torch.manual_seed(n * 100 + width)
    inputs = [x.double() for x in inputs_of(n, width)]
    found, expected = (outcome(f, inputs, n_differentiable) for f in (ours, formula))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", CASES)
def test_passes_torchs_own_checks(name: str) -> None:
    """Shapes without data, no aliasing, gradients by finite differences."""
    ours, _, inputs_of, n_differentiable = CASES[name]
    inputs: list[Any] = [x.double() for x in inputs_of(7, 6)]
    for x in inputs[:n_differentiable]:
        x.requires_grad_()
    operation, more = {
        "rms_norm": (row_ops.rms_norm, (EPS,)),
        "rms_norm_plus_one": (row_ops.rms_norm, (EPS, True)),
        "swiglu": (row_ops.gated_unit, ("silu",)),
        "geglu": (row_ops.gated_unit, ("gelu_tanh",)),
        "rotate": (row_ops.rotate, ()),
    }[name]
    torch.library.opcheck(operation.operator, (*inputs, *more))
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_as_near_as_its_rounding(name: str) -> None:
    ours, formula, inputs_of, n_differentiable = CASES[name]
    torch.manual_seed(0)
    inputs = [x.bfloat16() for x in inputs_of(40, 24)]
    found = outcome(ours, inputs, n_differentiable)
    expected = outcome(formula, [x.double() for x in inputs], n_differentiable)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-6, atol=2**-6 * float(b.abs().max()))


def test_a_wider_weight_widens_the_output_as_in_transformers() -> None:
    """Norms are fp32 over quantised layers in bf16."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm, x = LlamaRMSNorm(24, EPS), torch.randn(7, 24).bfloat16()
    norm.weight.data = torch.randn(24)
    results = []
    for function in (norm, lambda x: row_ops.rms_norm(x, norm.weight, EPS)[0]):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, norm.weight])])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(
            found, expected, rtol=2**-6, atol=2**-6 * float(expected.detach().abs().max())
        )


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    row_ops.rms_norm(x, weight, EPS)[0].sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_rows_may_lie_anywhere_in_memory() -> None:
    """Queries come transposed from their projection, and leading dimensions are free."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, dtype=torch.float64).transpose(0, 1)
    weight = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(row_ops.rms_norm(x, weight, EPS)[0], reference.rms_norm(x, weight, EPS))
    torch.testing.assert_close(
        row_ops.gated_unit(x, x.contiguous(), "silu"), reference.gated_unit(x, x, "silu")
    )
    cos, sin = torch.randn(2, 4, 6, dtype=torch.float64)
    turned = row_ops.rotate(x, x[:, :1], cos, sin)
    torch.testing.assert_close(turned[0], reference.rotate(x, cos, sin))
    torch.testing.assert_close(turned[1], reference.rotate(x[:, :1], cos, sin))
