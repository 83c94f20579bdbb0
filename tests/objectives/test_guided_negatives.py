"""Which negatives count, by a guide and by source: a spelt-out loss in double precision, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llm2vec_ds.objectives.contrastive.info_nce import (
    ContrastiveLoss,
    OwnNegatives,
    PairGuide,
    PairVectors,
    guided_share,
)
from llm2vec_ds.recipe.objectives import SupervisedConfig
from tests.support.ranks import run_ranks

N_QUERIES, WIDTH, GUIDE_WIDTH = 8, 6, 4
QUERY_IDS = [21, 22, 23, 24, 21, 23, 27, 28]  # 0 and 4, 2 and 5 are the same query
IDS = [1, 2, 3, 2, 5, 6, 1, 8]  # 0 and 6, 1 and 3 have the same positive; 0, 4 and 6 are a group not complete
KNOWN = set(zip(QUERY_IDS, IDS, strict=True))
NEGATIVE_OF = [0, 0, 1, 3, 4, 5, 5, 6, 7, 7]
NEGATIVE_IDS = [11, 5, 5, 14, 15, 16, 3, 18, 19, 1]  # a positive of query 0 among its own; so for 5
ALONE = [True, True, False, False, True, True, False, True]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"alone": None},
    "guide": {"alone": None, "guide": "g"},
    "margins": {"alone": None, "guide": "g", "guide_margin": 0.1, "guide_ratio": 0.8},
    "guide, all": {
        "alone": None,
        "guide": "g",
        "guide_ratio": 0.9,
        "symmetric": True,
        "matryoshka_dims": [3, 6],
        "false_negative_margin": 0.3,
        "hardness": 2.0,
    },
    "hard": {"alone": None, "hardness": 3.0},
    "alone": {"alone": ALONE},
    "alone, all": {
        "alone": ALONE,
        "guide": "g",
        "guide_margin": 0.05,
        "symmetric": True,
        "matryoshka_dims": [3, 6],
        "false_negative_margin": 0.3,
        "hardness": 2.0,
    },
    "all alone": {"alone": [True] * N_QUERIES, "guide": "g"},
    "taught": {
        "alone": None,
        "guide": "g",
        "guide_filters": False,
        "guide_weight": 0.7,
        "guide_loss": "kl",
        "guide_temperature": 0.2,
    },
    "filtered and taught": {"alone": ALONE, "guide": "g", "guide_weight": 2.0, "guide_loss": "mse"},
}


def config(case: str, exchange: str) -> SupervisedConfig:
    options = {key: value for key, value in CASES[case].items() if key != "alone"}
    return SupervisedConfig(exchange=exchange, **options)  # type: ignore[arg-type]


def vectors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, positives near them, negatives, and the scale; then the guide's, of length 1."""
    torch.manual_seed(0)
    found = []
    for width in (WIDTH, GUIDE_WIDTH):
        query = torch.randn(N_QUERIES, width, dtype=torch.float64)
        positive = query + torch.randn(N_QUERIES, width, dtype=torch.float64)
        negative = query[NEGATIVE_OF] + torch.randn(len(NEGATIVE_OF), width, dtype=torch.float64)
        found.append([query, positive, negative])
    # For the guide, query 6 is nearer to the positive of 4, in whose group it is, than to its own.
    found[1][1][4] = found[1][0][6] + 0.1 * found[1][1][4]
    scale = torch.tensor(5.0)
    own = [x.to(dtype).requires_grad_() for x in (*found[0], scale)]
    return [*own, *(F.normalize(x, dim=-1).to(dtype) for x in found[1])]


def counts(i: int, j: int, alone: Any, options: Any, cosines: Any, guides: Any) -> tuple[bool, bool]:
    """Whether document j is a negative of query i but for the guide, and whether the guide leaves it out."""
    own_only = alone is not None and alone[i]
    of_row = j >= N_QUERIES and NEGATIVE_OF[j - N_QUERIES] == i
    if j == i or (QUERY_IDS[i], (IDS + NEGATIVE_IDS)[j]) in KNOWN or (own_only and not of_row):
        return False, False
    if "guide" not in options or not options.get("guide_filters", True):
        out = False
    else:
        lower = (1 - options.get("guide_ratio", 1)) * abs(guides[i, i]) + options.get("guide_margin", 0)
        out = bool(guides[i, j] > guides[i, i] - lower)
    margin = options.get("false_negative_margin")
    near = margin is not None and bool(cosines[i, j] > cosines[i, i] + margin)
    return not near, out


def taught(cosine: torch.Tensor, guides: torch.Tensor, options: Any) -> torch.Tensor:
    """Loss of each query's cosines with all documents but its own text."""
    losses = []
    for i in range(N_QUERIES):
        others = [j for j, text in enumerate(IDS + NEGATIVE_IDS) if text != QUERY_IDS[i]]
        own, wanted = cosine[i, others], guides[i, others]
        if options["guide_loss"] == "mse":
            losses.append(((own - wanted) ** 2).mean())
        else:
            p = (wanted / options["guide_temperature"]).softmax(0)
            losses.append((p * (p.log() - (own / options["guide_temperature"]).log_softmax(0))).sum())
    return torch.stack(losses)


def spelt_out(case: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Loss, gradients, and how many documents the guide leaves out for each query."""
    query, positive, negative, scale, *guide = vectors(torch.float64)
    options, alone = CASES[case], CASES[case]["alone"]
    guides = guide[0] @ torch.cat(guide[1:]).T
    total = torch.zeros((), dtype=torch.float64)
    dims = options.get("matryoshka_dims") or [WIDTH]
    n_out = torch.zeros(N_QUERIES)
    for dim in dims:
        q, p, n = (F.normalize(x[:, :dim], dim=-1) for x in (query, positive, negative))
        cosine = q @ torch.cat([p, n]).T
        for i in range(N_QUERIES):
            counted, hardness = [scale * cosine[i, i]], options.get("hardness", 0)
            for j in range(N_QUERIES + len(NEGATIVE_OF)):
                is_negative, out = counts(i, j, alone, options, cosine, guides)
                weighted = scale * cosine[i, j] + hardness * cosine[i, j].detach()
                counted += [weighted] if is_negative and not out else []
                n_out[i] += out and dim == dims[-1]
            loss = torch.logsumexp(torch.stack(counted), 0) - scale * cosine[i, i]
            if options.get("symmetric") and not (alone and alone[i]):
                back = [scale * cosine[i, i]]
                for k in range(N_QUERIES):
                    limit = guides[i, i] - (
                        (1 - options.get("guide_ratio", 1)) * abs(guides[i, i])
                        + options.get("guide_margin", 0)
                    )
                    near = cosine[k, i] > cosine[i, i] + options["false_negative_margin"]
                    if k != i and (QUERY_IDS[k], IDS[i]) not in KNOWN and not near and guides[k, i] <= limit:
                        back.append(scale * cosine[k, i] + hardness * cosine[k, i].detach())
                loss = (loss + torch.logsumexp(torch.stack(back), 0) - scale * cosine[i, i]) / 2
            total = total + loss / (N_QUERIES * len(dims))
    if weight := options.get("guide_weight", 0):
        q, p, n = (F.normalize(x, dim=-1) for x in (query, positive, negative))
        total = total + weight * taught(q @ torch.cat([p, n]).T, guides, options).mean()
    gradients = torch.autograd.grad(total, [query, positive, negative, scale])
    return total.detach(), list(gradients), n_out


def found(case: str, exchange: str, queries: slice) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The same by the loss, for the share of one rank."""
    query, positive, negative, scale, *guide = vectors()
    negatives = torch.tensor(
        [k for k, i in enumerate(NEGATIVE_OF) if i in range(N_QUERIES)[queries]], dtype=int
    )
    alone = CASES[case]["alone"]
    pairs = PairVectors(
        query[queries],
        positive[queries],
        negative[negatives],
        torch.tensor(QUERY_IDS[queries], dtype=torch.int64),
        torch.tensor(IDS[queries], dtype=torch.int64),
        torch.tensor(NEGATIVE_IDS, dtype=torch.int64)[negatives],
        PairGuide(guide[0][queries], guide[1][queries], guide[2][negatives])
        if "guide" in CASES[case]
        else None,
        OwnNegatives(
            torch.tensor(alone[queries]),
            torch.tensor(NEGATIVE_OF)[negatives] - range(N_QUERIES)[queries].start,
        )
        if alone is not None
        else None,
    )
    outcome = ContrastiveLoss(config(case, exchange))(pairs, scale)
    gradients = torch.autograd.grad(outcome.share, [query, positive, negative, scale])
    return outcome.share.detach(), list(gradients), outcome.guided_Q


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_with_gradients(case: str, exchange: str) -> None:
    share, gradients, n_out = found(case, exchange, slice(None))
    expected, expected_gradients, expected_out = spelt_out(case)
    torch.testing.assert_close(share.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        assert theirs.abs().max() > 1e-3
    assert n_out.tolist() == expected_out.tolist()
    assert (n_out.sum() > 0) == ("guide" in CASES[case] and CASES[case].get("guide_filters", True))


def test_each_option_changes_the_loss() -> None:
    values = {case: round(float(spelt_out(case)[0]), 4) for case in CASES}
    assert len(set(values.values())) == len(CASES), values


def _on_ranks(rank: int, world: int) -> dict[str, Any]:
    """Of three ranks, the first has no query with in-batch negatives in the cases with `ALONE`."""
    edge = {2: [0, 4, 8], 3: [0, 1, 5, 8]}[world]
    queries = slice(edge[rank], edge[rank + 1])
    return {f"{case} {way}": found(case, way, queries) for case in CASES for way in ("gather", "ring")}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world: int) -> None:
    parts = run_ranks(_on_ranks, world)
    for case in CASES:
        expected, gradients, n_out = spelt_out(case)
        for exchange in ("gather", "ring"):
            of_ranks = [part[f"{case} {exchange}"] for part in parts]
            share = sum(part[0] for part in of_ranks)
            torch.testing.assert_close(share.double(), expected, rtol=1e-5, atol=1e-6)
            for place, theirs in enumerate(gradients):
                ours = sum(part[1][place] for part in of_ranks)
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
            assert torch.cat([part[2] for part in of_ranks]).tolist() == n_out.tolist()


def test_what_the_guide_cannot_tell_from_the_positive_is_left_out() -> None:
    """As texts that differ in capitals are for some models; how a tile rounds decides nothing."""
    generator = torch.Generator().manual_seed(3)
    query, positive, negative = torch.randn(3, 64, 8, generator=generator)
    guide = F.normalize(torch.randn(2, 64, 32, generator=generator), dim=-1)
    ids = torch.arange(64)
    pairs = PairVectors(
        query, positive, negative, ids, ids + 100, ids + 200, PairGuide(guide[0], guide[1], guide[1])
    )
    outcome = ContrastiveLoss(SupervisedConfig(guide="g"))(pairs, torch.tensor(5.0))
    above = (guide[0] @ guide[1].T).fill_diagonal_(-1) > (guide[0] * guide[1]).sum(-1, keepdim=True)
    assert outcome.guided_Q.tolist() == (2 * above.sum(1) + 1).tolist()


def test_a_document_of_the_querys_own_text_teaches_nothing() -> None:
    """As a second copy of a text would, whose cosine of 1 outweighs all others."""
    torch.manual_seed(0)
    vector, guide = torch.randn(3, 1, 6), F.normalize(torch.randn(3, 1, 5), dim=-1)
    options = SupervisedConfig(guide="g", guide_weight=1.0)
    shares = []
    for positive_id in (1, 2):
        ids = torch.tensor([1]), torch.tensor([positive_id]), torch.tensor([3])
        pairs = PairVectors(*vector, *ids, PairGuide(*guide))
        shares.append(float(guided_share(pairs, options, 1.0)))
    assert shares[0] == 0  # one document is left, whose share is 1 for both
    assert shares[1] > 0
