"""The contrastive loss over all ranks against a spelt-out double-precision one, with gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from llm2vec_ds.objectives.contrastive.info_nce import ContrastiveLoss, PairVectors
from llm2vec_ds.objectives.contrastive.known_positives import KnownPositives
from llm2vec_ds.recipe.objectives import ContrastiveConfig
from llm2vec_ds.vectors.quantized import Stored, dequantize, quantize
from tests.support.ranks import run_ranks

N_QUERIES, WIDTH = 7, 6
QUERY_IDS = [21, 22, 23, 24, 21, 23, 27]  # 0 and 4, 2 and 5 are the same query, with two positives
IDS = [1, 2, 3, 2, 5, 6, 1]  # of positives: queries 0 and 6, 1 and 3 have the same
KNOWN = set(zip(QUERY_IDS, IDS, strict=True))
NEGATIVE_OF = [0, 0, 1, 3, 4]  # which query each hard negative came with
NEGATIVE_IDS = [11, 5, 5, 14, 15]  # the second and third are the positive of query 4, so one of query 0, too

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "matryoshka": {"matryoshka_dims": [2, 6]},
    "margin": {"false_negative_margin": 0.1},
    "all": {"symmetric": True, "matryoshka_dims": [3, 6], "false_negative_margin": 0.2},
    "int8": {"stored_as": ["int8"]},
    "all, int8 and binary": {
        "symmetric": True,
        "matryoshka_dims": [3, 6],
        "false_negative_margin": 0.2,
        "stored_as": ["binary", "int8"],
    },
}


def vectors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, positives near them, negatives; and the scale."""
    torch.manual_seed(0)
    query = torch.randn(N_QUERIES, WIDTH)
    positive = query + torch.randn(N_QUERIES, WIDTH)
    negative = query[NEGATIVE_OF] + torch.randn(len(NEGATIVE_OF), WIDTH)
    return [x.to(dtype).requires_grad_() for x in (query, positive, negative, torch.tensor(5.0))]


def spelt_out(
    query: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    scale: torch.Tensor,
    symmetric: bool = False,
    matryoshka_dims: list[int] | None = None,
    false_negative_margin: float | None = None,
    stored_as: Sequence[Stored] = (),
) -> torch.Tensor:
    def stored(vector: torch.Tensor, form: Stored) -> torch.Tensor:
        """Of length 1, as it is read back; the gradient is that of the vector as it was."""
        unit = vector / vector.norm()
        read = dequantize(quantize(vector.detach()[None].numpy(), form), form, len(vector))[0]
        row = torch.from_numpy(read).to(unit)
        return unit + (row / row.norm() - unit).detach()

    def one_way(queries: Any, documents: Any, known: Any) -> torch.Tensor:
        losses = []
        for i, q in enumerate(queries):
            own = q @ documents[i]
            counted = []
            for j, document in enumerate(documents):
                value = q @ document
                too_near = false_negative_margin is not None and value > own + false_negative_margin
                if j == i or not (known(i, j) or too_near):
                    counted.append(value)
            losses.append(torch.logsumexp(scale * torch.stack(counted), 0) - scale * own)
        return torch.stack(losses).mean()

    total = torch.zeros((), dtype=query.dtype)
    dims = matryoshka_dims or [WIDTH]
    forms: list[Stored] = ["float32", *stored_as]
    for dim, form in itertools.product(dims, forms):
        q = [stored(x[:dim], "float32") for x in query]
        p, n = ([stored(x[:dim], form) for x in column] for column in (positive, negative))
        part = one_way(q, [*p, *n], lambda i, j: (QUERY_IDS[i], (IDS + NEGATIVE_IDS)[j]) in KNOWN)
        if symmetric:
            part = (part + one_way(p, q, lambda i, j: (QUERY_IDS[j], IDS[i]) in KNOWN)) / 2
        total = total + part / (len(dims) * len(forms))
    return total


def share_and_gradients(
    config: ContrastiveConfig, queries: slice, negatives: slice
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    query, positive, negative, scale = vectors()
    pairs = PairVectors(
        query[queries],
        positive[queries],
        negative[negatives],
        torch.tensor(QUERY_IDS[queries], dtype=torch.int64),
        torch.tensor(IDS[queries], dtype=torch.int64),
        torch.tensor(NEGATIVE_IDS[negatives], dtype=torch.int64),
    )
    share, hits, _ = ContrastiveLoss(config)(pairs, scale)
    gradients = torch.autograd.grad(share, [query, positive, negative, scale])
    return torch.stack([share.detach(), hits]), list(gradients)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_with_gradients(case: str, exchange: str) -> None:
    config = ContrastiveConfig(exchange=exchange, **CASES[case])  # type: ignore[arg-type]
    (share, _), gradients = share_and_gradients(config, slice(None), slice(None))
    inputs = vectors(torch.float64)
    expected = spelt_out(*inputs, **CASES[case])
    torch.testing.assert_close(share.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        assert theirs.abs().max() > 1e-2


def test_each_option_changes_the_loss() -> None:
    inputs = vectors(torch.float64)
    values = {name: spelt_out(*inputs, **options).item() for name, options in CASES.items()}
    assert len({round(value, 3) for value in values.values()}) == len(CASES)


def _on_ranks(rank: int, world: int) -> dict[str, Any]:
    """Unequal shares; the last rank of three has no negatives."""
    bounds = {2: ([0, 4, 7], [0, 3, 5]), 3: ([0, 1, 4, 7], [0, 2, 5, 5])}[world]
    queries, negatives = (slice(edge[rank], edge[rank + 1]) for edge in bounds)
    results = {}
    for case, options in CASES.items():
        for exchange in ("gather", "ring"):
            config = ContrastiveConfig(exchange=exchange, **options)  # type: ignore[arg-type]
            results[f"{case} {exchange}"] = share_and_gradients(config, queries, negatives)
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world: int) -> None:
    parts = run_ranks(_on_ranks, world)
    for case, options in CASES.items():
        expected, expected_gradients = share_and_gradients(
            ContrastiveConfig(**options), slice(None), slice(None)
        )
        for exchange in ("gather", "ring"):
            of_ranks = [part[f"{case} {exchange}"] for part in parts]
            torch.testing.assert_close(sum(r[0] for r in of_ranks), expected, rtol=1e-5, atol=1e-6)
            # Each rank has zeros for the rows of the others, which received its part of the gradient.
            for place, theirs in enumerate(expected_gradients):
                ours = sum(r[1][place] for r in of_ranks)
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def _rounded(rank: int, world: int, key: str) -> dict[str, Any]:
    queries, negatives = ((slice(0, 4), slice(0, 3)), (slice(4, 7), slice(3, 5)))[rank]
    return {
        exchange: share_and_gradients(
            ContrastiveConfig(exchange=exchange, **{key: "bf16"}),  # type: ignore[arg-type]
            queries,
            negatives,
        )
        for exchange in ("gather", "ring")
    }


@pytest.mark.parametrize("key", ["exchange_precision", "score_precision"])
def test_rounding_does_not_depend_on_ranks_or_way(key: str) -> None:
    """On the wire, or in the products."""
    rounded = ContrastiveConfig(**{key: "bf16"})  # type: ignore[arg-type]
    expected, gradients = share_and_gradients(rounded, slice(None), slice(None))
    exact, _ = share_and_gradients(ContrastiveConfig(), slice(None), slice(None))
    assert 1e-6 < abs(expected[0] - exact[0]) < 1e-2
    parts = run_ranks(partial(_rounded, key=key), 2)
    for exchange in ("gather", "ring"):
        together = sum(part[exchange][0] for part in parts)
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
        for place, theirs in enumerate(gradients):
            ours = sum(part[exchange][1][place] for part in parts)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_alike_documents_give_the_log_of_their_number() -> None:
    ones = torch.ones(8, 4)
    pairs = PairVectors(ones, ones, ones[:0], *[torch.arange(8)] * 2, torch.arange(0))
    share, hits, _ = ContrastiveLoss(ContrastiveConfig())(pairs, torch.tensor(20.0))
    torch.testing.assert_close(share, torch.tensor(math.log(8)))
    assert hits == 0


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_positives_of_one_query_are_no_negatives(exchange: Any) -> None:
    query, positive, _, scale = vectors()
    nobody, one_query = query[:0], torch.full((N_QUERIES,), 3)
    loss = ContrastiveLoss(ContrastiveConfig(exchange=exchange, symmetric=True))
    pairs = PairVectors(query, positive, nobody, one_query, torch.arange(N_QUERIES), one_query[:0])
    share, hits, _ = loss(pairs, scale)
    assert share == 0
    assert hits == N_QUERIES
    gradients = torch.autograd.grad(share, [query, positive])
    assert all((gradient == 0).all() for gradient in gradients)


def test_pairs_that_are_known_and_groups_that_are_not_complete() -> None:
    known = KnownPositives.of(torch.tensor([7, 7, 8, 9, 9]), torch.tensor([1, 2, 2, 4, 3]))
    assert known.groups(torch.tensor([1, 2, 3, 4, 5, 7])).tolist() == [1, 1, 3, 3, 5, 7]
    assert known.incomplete.tolist() == [1]  # 8 and 1 are no known pair
    queries, positives = torch.tensor([[7], [8], [9], [0]]), torch.tensor([[1, 2, 3, 4, 5]])
    assert known.are_known(queries, positives).int().tolist() == [
        [1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert len(KnownPositives.of(torch.arange(0), torch.arange(0)).incomplete) == 0


def test_a_chain_of_queries_is_one_group() -> None:
    numbers = torch.arange(40)
    known = KnownPositives.of(torch.cat([numbers, numbers]), torch.cat([numbers, (numbers + 1) % 40]))
    assert known.groups(numbers).unique().tolist() == [0]
    assert known.incomplete.tolist() == [0]
