"""What is done to a tile of InfoNCE in Triton: against PyTorch's way, and whole losses against the reference.

On a machine with a GPU they run there, else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from llm2vec_kernels.info_nce import api as info_nce
from llm2vec_kernels.info_nce import reference
from llm2vec_kernels.info_nce import tiles as info_nce_tiles
from llm2vec_kernels.info_nce import triton as info_nce_triton
from llm2vec_kernels.info_nce.epilogue import TorchEpilogue
from llm2vec_kernels.info_nce.tiles import Block, Guide

from tests.support.info_nce_examples import SMALL_TILE_MIB, Example, assert_equals_reference, example
from tests.support.interpreter import round_bf16_to_nearest

# The logarithm of 0 is −inf, as meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _in_triton() -> Iterator[None]:
    """Here too: small tiles, and operands of products as on a GPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(info_nce_triton, "PROGRAM_ELEMENTS", 64)
        monkeypatch.setattr(info_nce, "runs_triton", lambda device: True)
        if DEVICE.type == "cpu":
            round_bf16_to_nearest(monkeypatch)
        yield


def a_block(
    n_queries: int, n_documents: int, dtype: torch.dtype, ids: bool, limits: bool, seed: int
) -> tuple[Block, torch.Tensor]:
    """Queries of which some have no positive here, and their products."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def integers(low: int, high: int, n: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=generator, device=DEVICE)

    query, document = (
        torch.randn(n, 8, generator=generator, device=DEVICE, dtype=FP64).to(dtype)
        for n in (n_queries, n_documents)
    )
    wide = torch.promote_types(dtype, FP32)
    limit = torch.rand(n_queries, generator=generator, device=DEVICE, dtype=FP64).to(wide)
    block = Block(
        query,
        document,
        1.5,
        integers(-1, n_documents, n_queries),
        integers(0, 3, n_queries) if ids else None,
        integers(0, 3, n_documents) if ids else None,
        limit if limits else None,
    )
    return block, query.to(wide) @ document.to(wide).T


@settings(max_examples=30 if DEVICE.type == "cpu" else 8)  # each compiles
@given(
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 7, 64, 150])),
    dtype=st.sampled_from([FP64, FP32, BF16]),
    ids=st.booleans(),
    limits=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_tile_is_treated_as_in_pytorch(
    shape: tuple[int, int], dtype: torch.dtype, ids: bool, limits: bool, weighted: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Block, "operand_dtype", property(lambda block: block.query_QD.dtype))
        block, product = a_block(*shape, dtype, ids, limits, seed)
        ours, plain = (
            kind(block, product.clone()) for kind in (info_nce_triton.TritonEpilogue, TorchEpilogue)
        )
        found, expected = ours.statistics(), plain.statistics()
        weight = torch.linspace(-1, 1, shape[0], dtype=product.dtype, device=DEVICE) if weighted else None
        tolerance = 1e-12 if dtype == FP64 else 1e-5
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        lse = expected.lse_Q + 0.5  # as if there were other blocks
        a, b = (tile.coefficients(lse, 4.0, weight) for tile in (ours, plain))
        tolerance = 2**-7 if dtype == BF16 else tolerance
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize(
    "masks", [{}, {"ids": True, "limits": True}, {"ids": True, "guide": True, "hardness": 4.0}]
)
@pytest.mark.parametrize("equal_weights", [True, False])
def test_equals_the_full_matrix(masks: dict[str, Any], equal_weights: bool) -> None:
    case = on_device(example(130, 83, **masks))
    weight = torch.full((130,), 0.3) if equal_weights else torch.linspace(-1.0, 2.0, 130)
    assert_equals_reference(case, weight.to(DEVICE, FP64), FP64, 1e-9)
    if "limits" not in masks:
        assert_equals_reference(case, weight.to(DEVICE, FP64), FP32, 2e-5)


def test_a_row_without_any_document_that_counts_says_minus_infinity() -> None:
    block, product = a_block(5, 7, FP32, False, False, 0)
    zero = torch.zeros(7, dtype=torch.int64, device=DEVICE)
    block = Block(block.query_QD, block.document_ND, 1.0, zero[:5] - 1, zero[:5], zero)
    tile = info_nce_triton.TritonEpilogue(block, product)
    statistics = tile.statistics()
    assert all(x.isneginf().all() for x in statistics)
    assert (tile.coefficients(statistics.lse_Q, 1.0) == 0).all()


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    block, product = a_block(3, 100, FP32, False, True, 0)
    product[1, 70] = float("nan")
    statistics = info_nce_triton.TritonEpilogue(block, product).statistics()
    assert statistics.lse_Q.isnan().tolist() == [False, True, False]
    assert not statistics.positive_score_Q[1] > statistics.best_negative_Q[1]  # no hit


def test_arguments_may_lie_anywhere_in_memory() -> None:
    """A column of a table, say."""
    block, product = a_block(5, 7, FP64, True, True, 0)

    def column(x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None
        return torch.stack([x, torch.zeros_like(x)], 1)[:, 0]

    names = ("positive_Q", "query_id_Q", "document_id_N", "score_limit_Q")
    strided = replace(block, **{name: column(getattr(block, name)) for name in names})
    weight = torch.linspace(-1, 1, 5, dtype=FP64, device=DEVICE)
    tiles = [info_nce_triton.TritonEpilogue(b, product.clone()) for b in (block, strided)]
    plain, found = (tile.statistics() for tile in tiles)
    assert all(map(torch.equal, plain, found))
    a = tiles[0].coefficients(plain.lse_Q, 1.0, weight)
    b = tiles[1].coefficients(column(plain.lse_Q), 1.0, column(weight))
    assert torch.equal(a, b)


@pytest.fixture
def products_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fp16 and bf16, accumulated in fp32, which a CPU cannot do."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(Block, "operand_dtype", property(lambda block: block.query_QD.dtype))
        for module in (info_nce, info_nce_tiles):
            monkeypatch.setattr(module, "product", lambda a, b, out: out.copy_(a.to(out) @ b.to(out)))
        monkeypatch.setattr(info_nce, "add_product", lambda a, b, out: out.add_(a.to(out) @ b.to(out)))


@pytest.mark.usefixtures("products_as_on_a_gpu")
@pytest.mark.parametrize("held_elements", [info_nce.HELD_ELEMENTS, 24 * 40])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("equal_weights", [True, False])
def test_low_precision(
    dtype: torch.dtype, equal_weights: bool, held_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coefficients are rounded to the dtype before their products: that much may be lost."""
    monkeypatch.setattr(
        info_nce, "HELD_ELEMENTS", held_elements
    )  # a product of documents in one part, or two
    case = on_device(example(150, 260, guide=True, hardness=4.0))
    weight = torch.ones(150) if equal_weights else torch.linspace(0.1, 2.0, 150)
    ours = case.leaves(dtype)
    exact = [x.detach().to(FP64).requires_grad_() for x in ours]
    found = info_nce.info_nce(
        *ours[:2], case.positive, scale=ours[2], tile_mib=SMALL_TILE_MIB, **case.options()
    )
    loss, options = found.loss_Q, case.options()
    assert found.guided_Q.tolist() == case.guided().tolist()
    expected = reference.info_nce(*exact[:2], case.positive, scale=exact[2], **options)[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    weight = weight.to(DEVICE)
    got = torch.autograd.grad((loss * weight).sum(), ours)
    true = torch.autograd.grad((expected * weight).sum(), exact)
    for a, b in zip(got, true, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < torch.finfo(dtype).eps


def on_device(case: Example) -> Example:
    def moved(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(DEVICE)

    fields = {
        name: moved(getattr(case, name)) for name in ("query", "document", "positive", "scale", "limit")
    }
    ids = {name: x.to(DEVICE) for name, x in case.ids.items()}
    guide = None if case.guide is None else Guide(*(x.to(DEVICE) for x in case.guide))
    return Example(**fields, ids=ids, guide=guide, hardness=case.hardness)  # type: ignore[arg-type]
