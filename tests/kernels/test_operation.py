"""One operation, called in two ways: lean where nobody looks on, else as an operator of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llm2vec_kernels.operation import Operation
from torch.utils._python_dispatch import TorchDispatchMode


def _scaled_cube(x: torch.Tensor, factor: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return factor * x**3, x.abs().amax(-1)


def _shapes(x: torch.Tensor, factor: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], outcome: Any) -> None:
    x, ctx.factor = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, d_out: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, None]:
    (x,) = ctx.saved_tensors
    return None if d_out is None else 3 * ctx.factor * x**2 * d_out, None


scaled_cube = Operation("llm2vec_tests::scaled_cube", _scaled_cube, _shapes).with_gradient(
    _keep, _differentiate
)
NAME = "llm2vec_tests.scaled_cube.default"


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def test_both_ways_give_the_same(x: torch.Tensor) -> None:
    results = []
    for way in (scaled_cube, scaled_cube.operator):
        out, largest = way(x, 5.0)
        results.append((out, largest, *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.autograd.gradcheck(lambda x: scaled_cube(x)[0], x)


def test_defaults_are_filled_in(x: torch.Tensor) -> None:
    assert torch.equal(scaled_cube(x)[0], 2 * x**3)
    scaled_cube(x)[0].sum().backward()
    assert x.grad is not None


def test_nobody_looks_on(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher is not entered, and without gradients no function is made."""
    monkeypatch.setattr(scaled_cube, "operator", None)
    assert type(scaled_cube(x)[0].grad_fn).__name__ == "FunctionBackward"
    monkeypatch.setattr(scaled_cube, "_function", None)
    with torch.no_grad():
        assert scaled_cube(x)[0].grad_fn is None


def test_a_dispatch_mode_sees_one_operator(x: torch.Tensor) -> None:
    with Seen() as seen:
        out, _ = scaled_cube(x)
    assert seen.names == [NAME]
    out.sum().backward()
    assert x.grad is not None


def test_a_compiler_sees_one_operator(x: torch.Tensor) -> None:
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x: scaled_cube(x)[0] + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), 2 * x**3 + 1)
    assert graphs[0].count("llm2vec_tests.scaled_cube") == 1


def test_shapes_need_no_data() -> None:
    out, largest = scaled_cube(torch.empty(3, 4, device="meta"))
    assert (out.shape, largest.shape) == ((3, 4), (3,))


def test_there_is_no_second_gradient(x: torch.Tensor) -> None:
    (first,) = torch.autograd.grad(scaled_cube(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()
