"""The sum without a positive, in tiles, against the full matrix in double precision; gradients too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from llm2vec_kernels.info_nce import reference
from llm2vec_kernels.info_nce.log_sum_exp import log_sum_exp
from torch.utils.flop_counter import FlopCounterMode

from tests.support.info_nce_examples import SMALL_TILE_MIB, example

MASKS: list[dict[str, Any]] = [
    {},
    {"ids": True},
    {"limits": True},
    {"guide": True},
    {"hardness": 4.0},
    {"ids": True, "limits": True, "guide": True, "hardness": 4.0},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", [(1, 9), (130, 131), (200, 40)])
def test_equals_the_full_matrix(shape: tuple[int, int], masks: dict[str, Any], dtype: torch.dtype) -> None:
    if masks.get("limits") and dtype == torch.float32:
        pytest.skip("in fp32 a score may fall on the other side of its limit")
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    case = example(*shape, **masks)
    leaves, exact = case.leaves(dtype), case.leaves(torch.float64)
    ours = log_sum_exp(*leaves[:2], scale=leaves[2], tile_mib=SMALL_TILE_MIB, **case.options())
    expected = reference.log_sum_exp(*exact[:2], scale=exact[2], **case.options())
    torch.testing.assert_close(ours.lse_Q.double(), expected, rtol=tolerance, atol=tolerance)
    nobody = replace(case, positive=torch.full_like(case.positive, -1))
    assert ours.guided_Q.tolist() == nobody.guided().tolist()
    counts = expected.isfinite()
    weight = torch.linspace(-1.0, 2.0, shape[0], dtype=torch.float64)[counts]
    got = torch.autograd.grad((ours.lse_Q[counts] * weight.to(dtype)).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((expected[counts] * weight).sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(1 + b.abs().max()))


def test_where_nothing_counts_it_is_minus_infinity_and_adds_nothing() -> None:
    query, document, scale = example(5, 7).leaves(torch.float32)
    same = {"query_id_Q": torch.zeros(5).long(), "document_id_N": torch.zeros(7).long()}
    lse = log_sum_exp(query, document, scale=scale, **same).lse_Q
    assert lse.isneginf().all()
    loss = torch.stack([torch.ones(5), lse]).logsumexp(0)
    assert torch.equal(loss, torch.ones(5))
    for gradient in torch.autograd.grad(loss.sum(), (query, document, scale)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_without_a_query_there_is_no_gradient() -> None:
    leaves = example(0, 7).leaves(torch.float32)
    lse = log_sum_exp(*leaves[:2], scale=leaves[2]).lse_Q
    for gradient, leaf in zip(torch.autograd.grad(lse.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_four_matrix_products() -> None:
    query, document, scale = example(150, 260).leaves(torch.float32)
    with FlopCounterMode(display=False) as counter:
        log_sum_exp(query, document, scale=scale, tile_mib=SMALL_TILE_MIB).lse_Q.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 150 * 260 * 24


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="belong together"):
        log_sum_exp(torch.ones(2, 4), torch.ones(3, 4), scale=1.0, query_id_Q=torch.zeros(2).long())
