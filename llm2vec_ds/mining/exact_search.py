"""Exact search: finds the best rows of a matrix, tile by tile. The matrix need not fit in memory.

Shapes: B queries, N documents, D dimensions, K best, X exclusions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from llm2vec_kernels.products import product

ROUNDING = 1e-6
"""Two cosines that differ by less than this count as equal, because fp32 rounds."""


@dataclass(frozen=True)
class Exclusions:
    """Says which documents are no candidates of a query.

    Attributes:
        below_B: a candidate scores less than this, by more than ROUNDING.
        query_X, document_X: exclusions. This document is no candidate of this query.
    """

    below_B: torch.Tensor
    query_X: torch.Tensor
    document_X: torch.Tensor


@dataclass(frozen=True)
class Ranked:
    """The result of a search.

    Attributes:
        rows_BK: each query's candidates with the highest scores, best first, int64. −1 fills up to K.
        n_near_B: number of documents that are no candidates because they score too high.
    """

    rows_BK: np.ndarray
    n_near_B: np.ndarray


def best_rows(
    queries_BD: torch.Tensor, documents_ND: np.ndarray, k: int, exclusions: Exclusions, *, rows_per_tile: int
) -> Ranked:
    """Finds each query's k best candidates by inner products in fp32.

    Scores that differ only by rounding come in any order.

    Args:
        documents_ND: fp32, memory-mapped or not. One tile of `rows_per_tile` at a time is on the device.
    """
    device = queries_BD.device
    best_BK = torch.full((len(queries_BD), k), -torch.inf, device=device)
    rows_BK = torch.full((len(queries_BD), k), -1, device=device)
    n_near_B = torch.zeros(len(queries_BD), dtype=torch.int64, device=device)
    for start in range(0, len(documents_ND), rows_per_tile):
        tile_TD = torch.from_numpy(np.array(documents_ND[start : start + rows_per_tile])).to(device)
        scores_BT = product(queries_BD, tile_TD)
        n_near_B += _exclude(scores_BT, start, exclusions)
        score, row = scores_BT.topk(min(k, len(tile_TD)))
        row = torch.where(score > -torch.inf, row + start, -1)
        # The k best of this tile and of all earlier tiles are the k best so far.
        best_BK, order = torch.cat([best_BK, score], dim=1).topk(k)
        rows_BK = torch.cat([rows_BK, row], dim=1).gather(1, order)
    return Ranked(rows_BK.cpu().numpy(), n_near_B.cpu().numpy())


def _exclude(scores_BT: torch.Tensor, start: int, exclusions: Exclusions) -> torch.Tensor:
    """Sets scores of non-candidates to −inf, in place. Returns how many score too high, `[B]`."""
    here = (exclusions.document_X >= start) & (exclusions.document_X < start + scores_BT.shape[1])
    scores_BT[exclusions.query_X[here], exclusions.document_X[here] - start] = -torch.inf
    near_BT = scores_BT >= exclusions.below_B[:, None] - ROUNDING
    scores_BT.masked_fill_(near_BT, -torch.inf)
    return near_BT.sum(1)
