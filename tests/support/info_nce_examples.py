"""Random queries and documents for InfoNCE, and their losses and gradients held to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from llm2vec_kernels.info_nce import reference
from llm2vec_kernels.info_nce.api import info_nce
from llm2vec_kernels.info_nce.tiles import Guide

SMALL_TILE_MIB = 0.02  # at least 64 rows are held, so more queries than that make several tiles


@dataclass
class Example:
    query: torch.Tensor
    document: torch.Tensor
    positive: torch.Tensor
    scale: torch.Tensor
    ids: dict[str, torch.Tensor]
    limit: torch.Tensor | None
    guide: Guide | None = None
    hardness: float = 0.0

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Query, document and scale of their own."""
        scale = self.scale.to(torch.promote_types(dtype, torch.float32))
        return [
            x.detach().clone().requires_grad_()
            for x in (self.query.to(dtype), self.document.to(dtype), scale)
        ]

    def options(self) -> dict[str, Any]:
        others = {"score_limit_Q": self.limit, "guide": self.guide, "hardness": self.hardness}
        return {**self.ids, **others}

    def guided(self) -> torch.Tensor:
        """How many documents of each query the guide alone leaves out."""
        if self.guide is None:
            return torch.zeros(len(self.query))
        out = self.guide.query_QG @ self.guide.document_NG.T > self.guide.limit_Q[:, None]
        if self.ids:
            out &= self.ids["query_id_Q"][:, None] != self.ids["document_id_N"]
        here = self.positive >= 0
        out[here, self.positive[here]] = False
        return out.sum(1).float()


def example(
    n_queries: int,
    n_documents: int,
    *,
    ids: bool = False,
    limits: bool = False,
    guide: bool = False,
    hardness: float = 0.0,
    seed: int = 0,
) -> Example:
    generator = torch.Generator().manual_seed(seed)
    query, document = (
        F.normalize(torch.randn(n, 24, generator=generator, dtype=torch.float64), dim=-1)
        for n in (n_queries, n_documents)
    )
    positive = torch.randint(0, n_documents, (n_queries,), generator=generator)
    document_id = torch.randint(0, max(2, n_documents // 3), (n_documents,), generator=generator)
    given_ids = {"query_id_Q": document_id[positive], "document_id_N": document_id} if ids else {}
    limit = torch.rand(n_queries, generator=generator, dtype=torch.float64) * 4 if limits else None
    guides = Guide(
        *(torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (n_queries, n_documents)),
        torch.rand(n_queries, generator=generator, dtype=torch.float64) * 2,
    )
    scale = torch.tensor(12.0, dtype=torch.float64)
    return Example(query, document, positive, scale, given_ids, limit, guides if guide else None, hardness)


def assert_equals_reference(
    case: Example, weight: torch.Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    leaves, exact = case.leaves(dtype), case.leaves(torch.float64)
    ours = info_nce(*leaves[:2], case.positive, scale=leaves[2], tile_mib=SMALL_TILE_MIB, **case.options())
    loss, hit, lse = reference.info_nce(*exact[:2], case.positive, scale=exact[2], **case.options())
    torch.testing.assert_close(ours.loss_Q.double(), loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.lse_Q.double(), lse, rtol=tolerance, atol=tolerance)
    assert ours.hit_Q.tolist() == hit.tolist()
    assert ours.guided_Q.tolist() == case.guided().tolist()
    expected = torch.autograd.grad((loss * weight).sum(), exact)
    for attempt in range(2):  # the second backward through one graph recomputes what the first used up
        retain = attempt == 0
        got = torch.autograd.grad((ours.loss_Q * weight.to(ours.loss_Q)).sum(), leaves, retain_graph=retain)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=tolerance, atol=tolerance * float(1 + b.abs().max())
            )
