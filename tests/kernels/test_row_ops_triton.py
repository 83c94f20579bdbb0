"""RMSNorm, SwiGLU and rotary embedding in Triton, against the reference in fp64, gradients too.

On a machine with a GPU they run there, else in Triton's interpreter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from llm2vec_kernels.row_ops import api as row_ops
from llm2vec_kernels.row_ops import reference
from llm2vec_kernels.row_ops import triton as ours

from tests.support import row_op_cases as cases
from tests.support.interpreter import round_bf16_to_nearest

# A sigmoid's exponential may be infinite: its share is then 0, as meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = cases.EPS


def rms_norm(d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    out, inverse = ours.rms_norm(x, weight, EPS)
    return [out, *ours.rms_norm_backward(d_out, x, weight, inverse, False)]


def rms_norm_plus_one(d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    out, inverse = ours.rms_norm(x, weight, EPS, True)
    return [out, *ours.rms_norm_backward(d_out, x, weight, inverse, False, True)]


def swiglu(d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
    return [ours.gated_unit(gate, up, "silu"), *ours.gated_unit_backward(d_out, gate, up, "silu")]


def geglu(d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
    return [ours.gated_unit(gate, up, "gelu_tanh"), *ours.gated_unit_backward(d_out, gate, up, "gelu_tanh")]


def rotate(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> list[torch.Tensor]:
    d_q, d_k = d_out.split([q.shape[1], k.shape[1]], 1)
    return [torch.cat(ours.rotate(q, k, cos, sin), 1), *ours.rotate(d_q, d_k, cos, sin, True)]


OURS = {
    "rms_norm": rms_norm,
    "rms_norm_plus_one": rms_norm_plus_one,
    "swiglu": swiglu,
    "geglu": geglu,
    "rotate": rotate,
}


def found_and_expected(
    name: str, n: int, width: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients: ours in `dtype`, the formula's in fp64."""
    _, formula, inputs_of, n_differentiable = cases.CASES[name]
    torch.manual_seed(n * 100 + width)
    inputs = [x.to(DEVICE, dtype) for x in inputs_of(n, width)]
    wide = [x.double() for x in inputs]
    leaves = [x.requires_grad_() for x in wide[:n_differentiable]]
    out = formula(*leaves, *wide[n_differentiable:])
    d_out = torch.randn(out.shape).to(DEVICE, dtype)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, d_out.double())]
    return OURS[name](d_out, *inputs), expected


@pytest.fixture(autouse=True)
def _exact_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        round_bf16_to_nearest(monkeypatch)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Many tiles, and several to a program where the weight's gradient is summed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ours, "TILE_ELEMENTS", 64)
        monkeypatch.setattr(ours, "WEIGHT_GRADIENT_PROGRAMS", 2)
        yield


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", OURS)
@settings(max_examples=15)
@given(n=st.integers(0, 23), width=st.sampled_from([1, 5, 16, 19]))
def test_equals_the_formula(name: str, n: int, width: int) -> None:
    found, expected = found_and_expected(name, n, width, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2**-21), (torch.bfloat16, 2**-7)])
def test_is_as_near_as_the_rounding_of_its_dtype(name: str, dtype: torch.dtype, error: float) -> None:
    found, expected = found_and_expected(name, 40, 300, dtype)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=error, atol=error * float(b.abs().max()))


def test_a_wider_weight_widens_the_output() -> None:
    """Norms are fp32 over quantised layers in bf16: as on a CPU, which is tested against transformers."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 24).bfloat16(), torch.randn(24)
    expected = [*row_ops.rms_norm(x, weight, EPS)]
    expected += row_ops.rms_norm_backward(torch.ones(7, 24), x, weight, expected[1], False)
    x, weight, ones = (t.to(DEVICE) for t in (x, weight, torch.ones(7, 24)))
    found = [*ours.rms_norm(x, weight, EPS)]
    found += ours.rms_norm_backward(ones, x, weight, found[1], False)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("plus_one", [False, True])
def test_rounds_where_the_cpu_does(plus_one: bool) -> None:
    """Which is tested against transformers. Rows' sums are added up in another order."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 24).bfloat16(), torch.randn(24).bfloat16()
    expected, _ = row_ops.rms_norm(x, weight, EPS, plus_one)
    found, _ = ours.rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS, plus_one)
    assert (found.cpu() != expected).float().mean() < 0.01


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(5, 6, device=DEVICE), torch.randn(6, device=DEVICE)
    inverse = ours.rms_norm(x, weight, EPS)[1]
    (d_x, none), (same, _) = (
        ours.rms_norm_backward(x, x, weight, inverse, frozen) for frozen in (True, False)
    )
    assert torch.equal(d_x, same)
    assert none.shape == (0,)


def test_rows_may_lie_anywhere_in_memory() -> None:
    """Queries are one part of a wider projection's output."""
    torch.manual_seed(0)
    whole = torch.randn(4, 2, 18, dtype=torch.float64, device=DEVICE)
    x = whole.transpose(0, 1)[..., 5:11]
    weight = torch.randn(6, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(ours.rms_norm(x, weight, EPS)[0], reference.rms_norm(x, weight, EPS))
    torch.testing.assert_close(ours.gated_unit(x, x, "silu"), reference.gated_unit(x, x, "silu"))
    cos, sin = torch.randn(2, 2, 6, dtype=torch.float64, device=DEVICE)
    turned = ours.rotate(x, x[:, :1], cos, sin)
    torch.testing.assert_close(turned[0], reference.rotate(x, cos, sin))
    torch.testing.assert_close(turned[1], reference.rotate(x[:, :1], cos, sin))


def test_shapes_that_do_not_fit_are_refused() -> None:
    """A weight that ZeRO-3 holds elsewhere has no elements here."""
    x, none = torch.randn(4, 6, device=DEVICE), torch.empty(0, device=DEVICE)
    inverse = torch.ones(4, device=DEVICE)
    heads, angles = torch.randn(4, 2, 6, device=DEVICE), torch.randn(4, 4, device=DEVICE)
    for refused in (
        lambda: ours.rms_norm(x, none, EPS),
        lambda: ours.rms_norm_backward(x, x, none, inverse, False),
        lambda: ours.rms_norm_backward(x[:2], x, x[0], inverse, False),
        lambda: ours.gated_unit(x, x[:, :3], "silu"),
        lambda: ours.gated_unit_backward(x[:1], x, x, "silu"),
        lambda: ours.rotate(heads, heads, angles, angles),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            refused()


@pytest.mark.parametrize(
    "name", ["rms_norm", "rms_norm_backward", "gated_unit", "gated_unit_backward", "rotate"]
)
def test_operations_of_cuda_tensors_run_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class CudaTensor(torch.Tensor):
        is_cuda = True

    inputs = iter((CudaTensor(), CudaTensor(), CudaTensor()))
    monkeypatch.setattr(ours, name, lambda *_: "here")
    run = getattr(row_ops, f"_{name}")
    n_inputs = len(inspect.signature(run).parameters)
    assert run(*(next(inputs, None) for _ in range(n_inputs))) == "here"


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", cases.CASES)
def test_gradients_flow_through_the_operations(name: str) -> None:
    operation, formula, inputs_of, n_differentiable = cases.CASES[name]
    torch.manual_seed(0)
    inputs = [x.to(DEVICE, torch.float64) for x in inputs_of(40, 24)]
    found, expected = (cases.outcome(function, inputs, n_differentiable) for function in (operation, formula))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
