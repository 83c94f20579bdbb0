"""Texts of one side as negatives: a loss spelt out in double precision, with gradients, on ranks too."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llm2vec_ds.objectives.contrastive.info_nce import (
    ContrastiveLoss,
    OwnNegatives,
    PairGuide,
    PairVectors,
)
from llm2vec_ds.objectives.contrastive.known_positives import ConnectedTexts, KnownPositives
from llm2vec_ds.recipe.objectives import SimcseConfig, SupervisedConfig
from llm2vec_ds.vectors.quantized import Stored, dequantize, quantize
from tests.support.ranks import run_ranks

N_QUERIES, WIDTH, GUIDE_WIDTH = 8, 6, 4
QUERY_IDS = [21, 22, 23, 24, 21, 23, 5, 28]  # 0 and 4, 2 and 5 are the same query; 6 is the positive of 4
IDS = [1, 2, 3, 2, 5, 6, 7, 8]  # 1 and 3 have the same positive
NEGATIVE_OF = [0, 0, 1, 3, 4, 5, 5, 6, 7, 7]
NEGATIVE_IDS = [11, 5, 24, 14, 15, 16, 3, 1, 19, 22]  # among them queries 3 and 1, and positives
ALONE = [True, False, False, False, True, False, False, True]

CASES: dict[str, dict[str, Any]] = {
    "neither": {},
    "queries": {"between_queries": True},
    "documents": {"between_documents": True},
    "both": {"between_queries": True, "between_documents": True},
    "both, guide": {"between_queries": True, "between_documents": True, "guide": "g"},
    "both, alone": {"between_queries": True, "between_documents": True, "alone": ALONE},
    "all": {
        "alone": ALONE,
        "between_queries": True,
        "between_documents": True,
        "guide": "g",
        "guide_margin": 0.05,
        "guide_ratio": 0.9,
        "symmetric": True,
        "matryoshka_dims": [3, 6],
        "stored_as": ["int8", "binary"],
        "false_negative_margin": 0.3,
        "hardness": 2.0,
    },
}


def vectors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, positives near them, negatives, and the scale; then the guide's, of length 1."""
    generator = torch.Generator().manual_seed(0)

    def noise(n: int, width: int) -> torch.Tensor:
        return torch.randn(n, width, dtype=torch.float64, generator=generator)

    found = []
    for width in (WIDTH, GUIDE_WIDTH):
        query = noise(N_QUERIES, width)
        positive = query + noise(N_QUERIES, width)
        found.append([query, positive, query[NEGATIVE_OF] + noise(len(NEGATIVE_OF), width)])
    own = [x.to(dtype).requires_grad_() for x in (*found[0], torch.tensor(5.0))]
    return [*own, *(F.normalize(x, dim=-1).to(dtype) for x in found[1])]


def connected_with(row: int) -> set[int]:
    """Texts that are reached from a row's query by pairs, in either direction."""
    texts = {QUERY_IDS[row]}
    for _ in range(N_QUERIES):
        for pair in zip(QUERY_IDS, IDS, strict=True):
            if texts & set(pair):
                texts |= set(pair)
    return texts


def as_stored(x: torch.Tensor, form: Stored) -> torch.Tensor:
    """Rows of length 1 as they are read back; the gradient is that of the rows as they were."""
    unit = F.normalize(x, dim=-1)
    read = dequantize(quantize(unit.detach().numpy(), form), form, x.shape[1])
    return unit + (F.normalize(torch.from_numpy(read).to(unit), dim=-1) - unit).detach()


class SpeltOut:
    """Every sum of every query, one text after the other."""

    def __init__(self, case: str) -> None:
        self.options = CASES[case]
        *self.leaves, guide_q, guide_p, guide_n = vectors(torch.float64)
        self.guides = guide_q, torch.cat([guide_p, guide_n])

    def loss(self) -> tuple[torch.Tensor, list[int]]:
        """And how many texts the guide leaves out for each query, at full length in float32."""
        query, positive, negative, scale = self.leaves
        dims = self.options.get("matryoshka_dims") or [WIDTH]
        forms: list[Stored] = [*self.options.get("stored_as", ()), "float32"]
        total = torch.zeros((), dtype=torch.float64)
        for form, dim in product(forms, dims):
            q = F.normalize(query[:, :dim], dim=-1)
            d = torch.cat([as_stored(x[:, :dim], form) for x in (positive, negative)])
            self.n_out = [0] * N_QUERIES
            rows = [self._of_query(i, q, d, scale) for i in range(N_QUERIES)]
            total = total + torch.stack(rows).mean() / (len(forms) * len(dims))
        return total, self.n_out

    def _of_query(self, i: int, q: torch.Tensor, d: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        known = set(zip(QUERY_IDS, IDS, strict=True))
        alone = self.options.get("alone", [False] * N_QUERIES)[i]
        guide_q, guide_d = self.guides
        document_ids = IDS + NEGATIVE_IDS
        own, near = q[i] @ d[i], connected_with(i)

        def term(cosine: torch.Tensor, guide: torch.Tensor, *, counted: bool = True) -> list[torch.Tensor]:
            lower = (1 - self.options.get("guide_ratio", 1)) * abs(guide_q[i] @ guide_d[i])
            limit = guide_q[i] @ guide_d[i] - lower - self.options.get("guide_margin", 0)
            if "guide" in self.options and guide > limit:
                self.n_out[i] += counted
                return []
            if cosine > own + self.options.get("false_negative_margin", 9):
                return []
            return [scale * cosine + self.options.get("hardness", 0) * cosine.detach()]

        documents, further, back = [scale * own], [], [scale * own]
        for j, text in enumerate(document_ids):
            of_row = j >= N_QUERIES and NEGATIVE_OF[j - N_QUERIES] == i
            if j != i and (QUERY_IDS[i], text) not in known and (of_row or not alone):
                documents += term(q[i] @ d[j], guide_q[i] @ guide_d[j])
            if self.options.get("between_documents") and not alone and text not in near:
                further += term(d[i] @ d[j], guide_d[i] @ guide_d[j])
        for k, text in enumerate(QUERY_IDS):
            if self.options.get("between_queries") and not alone and text not in near:
                further += term(q[i] @ q[k], guide_q[i] @ guide_q[k])
            if k != i and (text, IDS[i]) not in known:
                back += term(q[k] @ d[i], guide_q[k] @ guide_d[i], counted=False)
        loss = torch.stack(documents + further).logsumexp(0) - scale * own
        if self.options.get("symmetric") and not alone:
            loss = (loss + torch.stack(back + further).logsumexp(0) - scale * own) / 2
        return loss


def found(case: str, exchange: str, queries: slice) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """Loss share, gradients and what the guide leaves out, of one rank's queries."""
    query, positive, negative, scale, *guide = vectors()
    mine = range(N_QUERIES)[queries]
    own = torch.tensor([k for k, i in enumerate(NEGATIVE_OF) if i in mine], dtype=torch.int64)
    options = dict(CASES[case])
    alone = options.pop("alone", None)
    of_own = torch.tensor(NEGATIVE_OF)[own] - mine.start
    pairs = PairVectors(
        query[queries],
        positive[queries],
        negative[own],
        torch.tensor(QUERY_IDS[queries]),
        torch.tensor(IDS[queries]),
        torch.tensor(NEGATIVE_IDS)[own],
        PairGuide(guide[0][queries], guide[1][queries], guide[2][own]) if "guide" in options else None,
        OwnNegatives(torch.tensor(alone[queries]), of_own) if alone else None,
    )
    outcome = ContrastiveLoss(SupervisedConfig(exchange=exchange, **options))(pairs, scale)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(outcome.share, [query, positive, negative, scale])
    return outcome.share.detach(), list(gradients), [int(n) for n in outcome.guided_Q]


def assert_equal(case: str, share: torch.Tensor, gradients: list[torch.Tensor], n_out: list[int]) -> None:
    spelt = SpeltOut(case)
    expected, expected_out = spelt.loss()
    torch.testing.assert_close(share.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, spelt.leaves), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        assert theirs.abs().max() > 1e-3
    assert n_out == expected_out
    assert any(n_out) == ("guide" in CASES[case])


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_with_gradients(case: str, exchange: str) -> None:
    assert_equal(case, *found(case, exchange, slice(None)))


def test_each_option_changes_the_loss() -> None:
    values = {case: round(SpeltOut(case).loss()[0].item(), 4) for case in CASES}
    assert len(set(values.values())) == len(CASES), values


def _on_ranks(rank: int, world: int) -> dict[str, Any]:
    """Of three ranks, the first has no query with in-batch negatives in the cases with `ALONE`."""
    edge = {2: [0, 4, 8], 3: [0, 1, 5, 8]}[world]
    queries = slice(edge[rank], edge[rank + 1])
    return {f"{case} {way}": found(case, way, queries) for case in CASES for way in ("gather", "ring")}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_the_formula(world: int) -> None:
    parts = run_ranks(_on_ranks, world)
    for case, way in product(CASES, ("gather", "ring")):
        of_ranks = [part[f"{case} {way}"] for part in parts]
        gradients = [torch.stack(each).sum(0) for each in zip(*(part[1] for part in of_ranks), strict=True)]
        n_out = [n for part in of_ranks for n in part[2]]
        assert_equal(case, torch.stack([part[0] for part in of_ranks]).sum(), gradients, n_out)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_what_travels_in_bf16_is_rounded_in_every_sum_and_the_positive_too(exchange: Any) -> None:
    query, positive, *_ = (x.detach() for x in vectors())
    ids = torch.arange(N_QUERIES)
    config = SupervisedConfig(
        exchange=exchange,
        exchange_precision="bf16",
        between_queries=True,
        between_documents=True,
        symmetric=True,
    )
    pairs = PairVectors(query, positive, query[:0], ids, ids + 50, ids[:0])
    share = ContrastiveLoss(config)(pairs, torch.tensor(20.0)).share
    q, p = (F.normalize(x, dim=-1) for x in (query, positive))
    losses = []
    for a, b in ((q, p), (p, q)):
        across, *inside = (
            20 * x.double() @ y.to(torch.bfloat16).double().T for x, y in ((a, b), (q, q), (p, p))
        )
        others = [x.masked_fill(torch.eye(N_QUERIES, dtype=torch.bool), -torch.inf) for x in inside]
        losses.append(torch.cat([across, *others], 1).logsumexp(1) - across.diagonal())
    torch.testing.assert_close(share.double(), torch.stack(losses).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_where_all_texts_are_connected_nothing_is_added(exchange: Any) -> None:
    """A sum over nothing gives no NaN."""
    query, positive, _, scale, *_ = vectors()
    one, nobody = torch.full((N_QUERIES,), 3), query[:0]
    config = SupervisedConfig(exchange=exchange, between_queries=True, between_documents=True)
    pairs = PairVectors(query, positive, nobody, one, torch.arange(N_QUERIES), one[:0])
    share = ContrastiveLoss(config)(pairs, scale).share
    assert share == 0
    for gradient in torch.autograd.grad(share, [query, positive, scale]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_simcse_with_both_has_all_other_copies_as_negatives() -> None:
    """All other copies of the batch are negatives (cf. NT-Xent: Chen et al., 2020, arXiv 2002.05709)."""
    first, second, *_ = vectors()
    first, second = first.detach(), second.detach()
    ids = torch.arange(N_QUERIES)
    config = SimcseConfig(between_queries=True, between_documents=True)
    pairs = PairVectors(first, second, second[:0], ids, ids, ids[:0])
    share = ContrastiveLoss(config)(pairs, torch.tensor(20.0)).share
    q, p = (F.normalize(x.double(), dim=-1) for x in (first, second))
    others = ~torch.eye(N_QUERIES, dtype=torch.bool)
    losses = []
    for i in range(N_QUERIES):
        scores = torch.cat([q[i] @ p.T, (q[i] @ q.T)[others[i]], (p[i] @ p.T)[others[i]]])
        losses.append((20 * scores).logsumexp(0) - 20 * q[i] @ p[i])
    torch.testing.assert_close(share.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_texts_are_connected_whichever_side_they_stand_on() -> None:
    known = KnownPositives.of(torch.tensor([1, 2, 4, 9]), torch.tensor([2, 3, 5, 5]))
    labels = ConnectedTexts.of(known).labels(torch.tensor([1, 2, 3, 4, 5, 9, 7]))
    assert labels.tolist() == [1, 1, 1, 4, 4, 4, 7]
