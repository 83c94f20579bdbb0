"""InfoNCE and its global form against a spelt-out double-precision loss."""

from __future__ import annotations

import math

import torch

from llm2vec_ds.loss.contrastive import global_info_nce, info_nce
from tests.support.ranks import run_ranks


def spelt_out(query: torch.Tensor, document: torch.Tensor, hashes: list[int], scale: float) -> torch.Tensor:
    losses = []
    for i in range(len(query)):
        scores = []
        for j in range(len(document)):
            cosine = query[i] @ document[j] / (query[i].norm() * document[j].norm())
            if j == i or hashes[j] != hashes[i]:
                scores.append(scale * cosine)
        own = scale * (query[i] @ document[i]) / (query[i].norm() * document[i].norm())
        losses.append(torch.logsumexp(torch.stack(scores), 0) - own)
    return torch.stack(losses)


def example(n: int = 7) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    torch.manual_seed(0)
    return torch.randn(n, 5), torch.randn(n, 5), [1, 2, 3, 2, 5, 6, 1][:n]


def test_equals_the_formula_with_gradients() -> None:
    query, document, hashes = example()
    results = []
    for dtype in (torch.float32, torch.float64):
        q, d = (x.detach().clone().to(dtype).requires_grad_() for x in (query, document))
        if dtype == torch.float64:
            loss = spelt_out(q, d, hashes, 20.0)
        else:
            loss = global_info_nce(q, d, torch.tensor(hashes), scale=20.0)
        loss.sum().backward()
        results.append([loss.detach(), q.grad, d.grad])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_alike_documents_give_the_log_of_their_number() -> None:
    ones = torch.ones(8, 4)
    loss = info_nce(ones, ones, torch.arange(8), scale=20.0)
    torch.testing.assert_close(loss, torch.full((8,), math.log(8)))


def _rank_loss(rank: int, world: int) -> list[torch.Tensor]:
    query, document, hashes = example()
    bounds = [0, 4, 7] if world == 2 else [0, 2, 4, 7]
    own = slice(bounds[rank], bounds[rank + 1])
    q, d = query[own].requires_grad_(), document[own].requires_grad_()
    loss = global_info_nce(q, d, torch.tensor(hashes[own]), scale=20.0)
    loss.sum().backward()
    return [loss.detach(), q.grad, d.grad]  # type: ignore[list-item]


def test_ranks_together_equal_one_process() -> None:
    query, document, hashes = example()
    q, d = query.requires_grad_(), document.requires_grad_()
    loss = global_info_nce(q, d, torch.tensor(hashes), scale=20.0)
    loss.sum().backward()
    for world in (2, 3):
        parts = run_ranks(_rank_loss, world)
        for position, expected in enumerate((loss.detach(), q.grad, d.grad)):
            together = torch.cat([part[position] for part in parts])
            torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
