"""fp32 products on a CPU by either library, against fp64; and which of them is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm2vec_kernels import products as module
from llm2vec_kernels.products import cpu_products, product, usual_library


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    cpu_products.cache_clear()
    yield
    cpu_products.cache_clear()


@pytest.mark.parametrize("onednn", ["0", "1"])
@settings(max_examples=30)
@given(
    n_rows=st.integers(0, 70),
    inner=st.integers(0, 70),
    outer=st.integers(1, 70),
    turned=st.tuples(*[st.booleans()] * 4),
)
def test_equals_fp64(
    onednn: str, n_rows: int, inner: int, outer: int, turned: tuple[bool, bool, bool, bool]
) -> None:
    """Each operand as it is or a view with other strides, with and without bias."""
    x_turned, weight_turned, has_bias, bias_strided = turned
    generator = torch.Generator().manual_seed(n_rows + inner + outer)
    x = torch.randn(n_rows, inner, generator=generator)
    weight = torch.randn(outer, inner, generator=generator)
    bias = torch.randn(outer, generator=generator) if has_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    x = x.T.contiguous().T if x_turned else x
    weight = weight.T.contiguous().T if weight_turned else weight
    if bias is not None and bias_strided:
        bias = torch.stack([bias, -bias], dim=1)[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM2VEC_ONEDNN", onednn)
        patch.setattr(module, "LEAST_FOR_ONEDNN", 1)
        cpu_products.cache_clear()
        assert cpu_products().name == ("oneDNN" if onednn == "1" else usual_library())
        found = product(x, weight, bias)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_rows", "is_onednn"), [(63, False), (64, True)])
def test_small_products_are_the_usual_librarys(
    n_rows: int, is_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM2VEC_ONEDNN", "1")
    calls: list[int] = []
    plain = module._onednn

    def counting(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(*arguments)

    monkeypatch.setattr(module, "_onednn", counting)
    x, weight = torch.ones(n_rows, 128), torch.ones(128, 128)
    assert torch.equal(product(x, weight), torch.full((n_rows, 128), 128.0))
    assert bool(calls) == is_onednn


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_ONEDNN", "1")
    x, weight = torch.randn(5, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    assert torch.equal(product(x, weight), x @ weight.T)


FAST = "oneDNN is 2.2 times as fast as USUAL here"


@pytest.mark.parametrize(
    ("environment", "ratio", "there", "is_onednn", "reason"),
    [
        (None, 2.2, True, True, FAST),
        (None, 1.4, True, False, "oneDNN is 1.4 times as fast as USUAL here"),
        ("0", 2.2, True, False, "LLM2VEC_ONEDNN=0"),
        ("1", 0.9, True, True, "LLM2VEC_ONEDNN=1"),
        ("no", 2.2, True, True, f"LLM2VEC_ONEDNN=no is neither 0 nor 1; {FAST}"),
        ("1", 2.2, False, False, "this PyTorch has no oneDNN"),
    ],
)
def test_the_much_faster_one_is_chosen_unless_the_user_says(
    environment: str | None,
    ratio: float,
    there: bool,
    is_onednn: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLM2VEC_ONEDNN", raising=False)
    if environment is not None:
        monkeypatch.setenv("LLM2VEC_ONEDNN", environment)
    monkeypatch.setattr(module, "_speed_of_onednn", lambda: ratio)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    usual = usual_library()
    chosen = cpu_products()
    assert chosen[:2] == ("oneDNN" if is_onednn else usual, reason.replace("USUAL", usual))
    assert ("LRU_CACHE_CAPACITY=" in chosen.environment) == is_onednn


def test_a_gradient_is_not_lost_silently() -> None:
    with pytest.raises(RuntimeError, match="product has no gradient"):
        product(torch.randn(2, 3, requires_grad=True), torch.randn(4, 3))


def test_measuring_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0.1 < module._speed_of_onednn() < 10
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


MANY_SHAPES = """
import torch
from llm2vec_kernels.products import product

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024

weights = [torch.randn(n, 64) for n in (512, 192, 64)]
product(torch.randn(900, 64), weights[0])
before = resident_mib()
for n_rows in range(300, 700):
    for weight in weights:
        product(torch.randn(n_rows, 64), weight)
print(resident_mib() - before)
"""


def test_compiled_products_of_many_shapes_do_not_pile_up() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in module._CACHES}
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHAPES],
        env={**environment, "LLM2VEC_ONEDNN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 200, done.stdout
