"""InfoNCE in tiles against the full matrix in double precision, gradients too; and what it holds."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from llm2vec_kernels.info_nce import reference
from llm2vec_kernels.info_nce import tiles as info_nce_tiles
from llm2vec_kernels.info_nce.api import block_gradients, block_log_sum_exp, info_nce, merge_statistics
from llm2vec_kernels.info_nce.tiles import CHUNK_ELEMENTS, Guide
from torch.utils.flop_counter import FlopCounterMode

from tests.support.info_nce_examples import SMALL_TILE_MIB, Example, assert_equals_reference, example

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (37, 83), (130, 131), (200, 40)])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"ids": True},
        {"limits": True},
        {"guide": True},
        {"ids": True, "limits": True},
        {"hardness": 4.0},
        {"ids": True, "limits": True, "guide": True, "hardness": 4.0},
    ],
)
@pytest.mark.parametrize("equal_weights", [True, False])
def test_equals_the_full_matrix(shape: tuple[int, int], masks: dict[str, Any], equal_weights: bool) -> None:
    case = example(*shape, **masks)
    weight = torch.full((shape[0],), 0.3) if equal_weights else torch.linspace(-1.0, 2.0, shape[0])
    assert_equals_reference(case, weight.double(), torch.float64, 1e-10)
    if not masks.get("limits"):  # in fp32 a score may fall on the other side of its limit
        assert_equals_reference(case, weight.double(), torch.float32, 2e-5)


@pytest.mark.parametrize("equal_weights", [True, False])
def test_bf16_products_of_fp32_vectors(equal_weights: bool) -> None:
    """Operands are rounded and nothing else is: on a CPU the coefficients, too, stay as they are. Gradients
    are fp32, and near those of the vectors as they came."""
    case = example(130, 70, ids=True, guide=True, hardness=2.0)
    weight = torch.full((130,), 0.3) if equal_weights else torch.linspace(-1.0, 2.0, 130)
    leaves = case.leaves(torch.float32)
    options = {"tile_mib": SMALL_TILE_MIB, **case.options()}
    ours = info_nce(*leaves[:2], case.positive, scale=leaves[2], precision="bf16", **options)
    rounded = replace(case, query=case.query.bfloat16().double(), document=case.document.bfloat16().double())
    found = [ours.loss_Q.detach(), *torch.autograd.grad((ours.loss_Q * weight).sum(), leaves)]
    assert all(x.dtype == torch.float32 for x in found)
    for own, tolerance in ((rounded, 2e-5), (case, 2**-8 * float(case.scale))):
        exact = own.leaves(torch.float64)
        loss, *_ = reference.info_nce(*exact[:2], own.positive, scale=exact[2], **own.options())
        expected = [loss.detach(), *torch.autograd.grad((loss * weight).sum(), exact)]
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).abs().max() <= tolerance * float(1 + b.abs().max())


def test_a_second_backward_through_bf16_products_is_the_first() -> None:
    case = example(40, 50)
    leaves = case.leaves(torch.float32)
    loss_Q = info_nce(*leaves[:2], case.positive, scale=leaves[2], precision="bf16").loss_Q
    weight_Q = torch.linspace(0.5, 2.0, 40)
    first, second = (torch.autograd.grad(loss_Q, leaves, weight_Q, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_guide_looks_at_a_few_documents_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_nce_tiles, "HELD_ELEMENTS", 64 * 7)
    case = example(70, 60, ids=True, guide=True)
    assert 0 < case.guided().sum() < case.guided().numel() * 60
    assert_equals_reference(case, torch.linspace(-1.0, 2.0, 70).double(), torch.float64, 1e-10)


def test_without_a_query_there_is_no_loss_and_no_gradient() -> None:
    """A rank may have none that has in-batch negatives."""
    case = example(0, 7, guide=True)
    leaves = case.leaves(torch.float32)
    ours = info_nce(*leaves[:2], case.positive, scale=leaves[2], **case.options())
    for gradient, leaf in zip(torch.autograd.grad(ours.loss_Q.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_reference_is_cross_entropy() -> None:
    case = example(20, 50)
    query, document, scale = case.leaves(torch.float64)
    loss, _, _ = reference.info_nce(query, document, case.positive, scale=scale)
    plain = F.cross_entropy(scale * query @ document.T, case.positive, reduction="none")
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)


def test_without_any_negative_the_loss_is_zero() -> None:
    case = example(5, 7)
    query, document, scale = case.leaves(torch.float32)
    same = {"query_id_Q": torch.zeros(5).long(), "document_id_N": torch.zeros(7).long()}
    ours = info_nce(query, document, case.positive, scale=scale, **same)
    assert ours.loss_Q.abs().max() < 1e-6
    assert ours.hit_Q.all()
    for gradient in torch.autograd.grad(ours.loss_Q.sum(), (query, document, scale)):
        assert gradient.abs().max() < 1e-5


def test_only_what_needs_a_gradient_gets_one_and_no_grad_gives_the_same_loss() -> None:
    case = example(10, 20)
    for needed in range(3):
        leaves = [x.requires_grad_(i == needed) for i, x in enumerate(case.leaves(torch.float32))]
        loss = info_nce(*leaves[:2], case.positive, scale=leaves[2]).loss_Q
        loss.sum().backward()
        assert [x.grad is not None for x in leaves] == [i == needed for i in range(3)]
        with torch.no_grad():
            again = info_nce(*leaves[:2], case.positive, scale=leaves[2]).loss_Q
        assert not again.requires_grad
        assert torch.equal(again, loss)


def in_blocks(case: Example, cuts: list[int], weight: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Statistics merged over blocks of documents, then gradients summed over them."""
    blocks = []
    for start, stop in pairwise(cuts):
        positive = torch.where((case.positive >= start) & (case.positive < stop), case.positive - start, -1)
        own = replace(case, document=case.document[start:stop], positive=positive)
        if case.ids:
            own.ids = {**case.ids, "document_id_N": case.ids["document_id_N"][start:stop]}
        if case.guide is not None:
            own.guide = case.guide.part(slice(None), slice(start, stop))
        blocks.append(own)

    def arguments(b: Example) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, object]]:
        options = {"scale": b.scale, "positive_Q": b.positive, "tile_mib": SMALL_TILE_MIB, **b.options()}
        return (b.query, b.document), options

    total = None
    for block in blocks:
        args, options = arguments(block)
        own_statistics = block_log_sum_exp(*args, **options)  # type: ignore[arg-type]
        total = own_statistics if total is None else merge_statistics(total, own_statistics)
    assert total is not None
    parts = []
    for block in blocks:
        args, options = arguments(block)
        parts.append(block_gradients(*args, lse_Q=total.lse_Q, weight_Q=weight, **options))  # type: ignore[arg-type]
    gradients = (
        torch.stack([p.d_query_QD for p in parts]).sum(0),
        torch.cat([p.d_document_ND for p in parts]),
        torch.stack([p.d_scale for p in parts]).sum(0),
    )
    return tuple(total), gradients


@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(1, 59), min_size=1, max_size=3, unique=True),
    ids=st.booleans(),
    limits=st.booleans(),
    guide=st.booleans(),
    hardness=st.sampled_from([0.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_blocks_together_equal_the_whole(
    cuts: list[int], ids: bool, limits: bool, guide: bool, hardness: float, seed: int
) -> None:
    case = example(70, 60, ids=ids, limits=limits, guide=guide, hardness=hardness, seed=seed)
    weight = torch.linspace(-1.0, 2.0, 70, dtype=torch.float64)
    statistics, gradients = in_blocks(case, [0, *sorted(cuts), 60], weight)
    exact = case.leaves(torch.float64)
    loss, hit, lse = reference.info_nce(*exact[:2], case.positive, scale=exact[2], **case.options())
    torch.testing.assert_close(statistics[0], lse, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(statistics[0] - statistics[1], loss, rtol=1e-10, atol=1e-10)
    assert (statistics[1] > statistics[2]).tolist() == hit.tolist()
    assert statistics[3].tolist() == case.guided().tolist()
    expected = torch.autograd.grad((loss * weight).sum(), exact)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_block_without_any_document_that_counts_says_minus_infinity() -> None:
    case = example(6, 4)
    nobody, zero = torch.full((6,), -1), torch.zeros(6).long()
    arguments = {"scale": 3.0, "positive_Q": nobody, "query_id_Q": zero, "document_id_N": zero[:4]}
    statistics = block_log_sum_exp(case.query, case.document, **arguments)  # type: ignore[arg-type]
    assert all(x.isneginf().all() for x in statistics[:3])
    gradients = block_gradients(
        case.query,
        case.document,
        lse_Q=statistics.lse_Q,
        weight_Q=torch.ones(6),
        **arguments,  # type: ignore[arg-type]
    )
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize(
    ("dtype", "equal_weights", "products"),
    [(torch.float32, True, 3), (torch.float32, False, 5), (torch.bfloat16, True, 4)],
)
def test_number_of_matrix_products(dtype: torch.dtype, equal_weights: bool, products: int) -> None:
    case = example(150, 260)
    leaves = case.leaves(dtype)
    weight = torch.ones(150) if equal_weights else torch.linspace(0.1, 2.0, 150)
    with FlopCounterMode(display=False) as counter:
        ours = info_nce(*leaves[:2], case.positive, scale=leaves[2], tile_mib=SMALL_TILE_MIB)
        (ours.loss_Q * weight).sum().backward()
    assert counter.get_total_flops() == products * 2 * 150 * 260 * 24


@pytest.mark.parametrize("chunk_elements", [CHUNK_ELEMENTS, 24 * 50])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("equal_weights", [True, False])
def test_low_precision_loses_no_more_than_twice_what_the_full_matrix_does(
    dtype: torch.dtype, equal_weights: bool, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all documents in fp32 at once, and with a few at a time."""
    monkeypatch.setattr(info_nce_tiles, "CHUNK_ELEMENTS", chunk_elements)
    case = example(150, 260, ids=False)
    weight = torch.ones(150) if equal_weights else torch.linspace(0.1, 2.0, 150)
    exact, naive, ours = case.leaves(torch.float64), case.leaves(dtype), case.leaves(dtype)
    exact = [x.detach().to(torch.float64).requires_grad_() for x in naive]
    plain = F.cross_entropy(
        naive[2] * (naive[0].float() @ naive[1].float().T), case.positive, reduction="none"
    )
    results = []
    for loss, leaves in (
        (reference.info_nce(*exact[:2], case.positive, scale=exact[2])[0], exact),
        (plain, naive),
        (info_nce(*ours[:2], case.positive, scale=ours[2], tile_mib=SMALL_TILE_MIB).loss_Q, ours),
    ):
        gradients = torch.autograd.grad((loss * weight.to(loss)).sum(), leaves)
        results.append([x.detach().double() for x in (loss, *gradients)])
    for truth, full, own in zip(*results, strict=True):
        bound = 2 * (full - truth).square().mean().sqrt() + 1e-6 * truth.abs().max()
        assert (own - truth).square().mean().sqrt() <= bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_Q": torch.tensor([0, 9])}, "positive_Q must be rows"),
        ({"positive_Q": torch.tensor([0, -1])}, "positive_Q must be rows"),
        ({"positive_Q": torch.tensor([0])}, r"positive_Q must be \[2\]"),
        ({"document_ND": torch.ones(3, 5)}, r"\[Q, D\] and \[N, D\]"),
        ({"document_ND": torch.ones(3, 4).half()}, "share a dtype"),
        ({"query_id_Q": torch.zeros(2).long()}, "belong together"),
        (
            {"guide": Guide(torch.ones(2, 5), torch.ones(3, 4), torch.ones(2))},
            r"a guide must be \[2, G\], \[3, G\] and \[2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "query_QD": torch.ones(2, 4),
        "document_ND": torch.ones(3, 4),
        "positive_Q": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        info_nce(**{**arguments, **change}, scale=1.0)


def test_autocast_does_not_round_the_scores() -> None:
    case = example(10, 20)
    query, document, scale = case.leaves(torch.float32)
    plain = info_nce(query, document, case.positive, scale=scale).loss_Q
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(query, document, case.positive, scale=scale).loss_Q, plain)


def test_memory_over_forward_and_backward_is_a_tile() -> None:
    """16,384 × 16,384 scores are 1 GiB; measured as growth of resident memory in a process of its own."""
    line = [sys.executable, str(ROOT / "benchmarks" / "info_nce.py"), "--peak-only", "--device", "cpu"]
    line += ["--n", "16384", "--dim", "32", "--dtype", "fp32", "--tile", "32"]
    steady = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
    peak_extra_mib = float(subprocess.check_output(line, text=True, env=steady))
    assert 32 <= peak_extra_mib <= 100
