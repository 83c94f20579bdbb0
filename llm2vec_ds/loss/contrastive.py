"""InfoNCE over the global batch: every rank's queries against every rank's documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm2vec_ds.distributed import gather_rows, rank


def info_nce(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    positive_Q: torch.Tensor,
    *,
    scale: float,
    excluded_QN: torch.Tensor | None = None,
) -> torch.Tensor:
    """−log softmax of scale · cosine at each query's positive, `[Q]` fp32 (van den Oord et al., 2018).

    Args:
        positive_Q: row of `document_ND` that is right for each query.
        scale: the inverse temperature.
        excluded_QN: True where a document is neither positive nor negative for a query.
    """
    query_QD, document_ND = F.normalize(query_QD.float(), dim=-1), F.normalize(document_ND.float(), dim=-1)
    score_QN = scale * query_QD @ document_ND.T
    if excluded_QN is not None:
        score_QN = score_QN.masked_fill(excluded_QN, float("-inf"))
    return F.cross_entropy(score_QN, positive_Q, reduction="none")


def global_info_nce(
    query_QD: torch.Tensor, document_QD: torch.Tensor, text_hash_Q: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Loss `[Q]` of this rank's queries, with all ranks' documents as in-batch negatives.

    Row i of `document_QD` is the positive of query i. A document with the same text hash is no negative:
    the exclusion is by content, so it holds across ranks. The gradient for this rank's documents holds
    what all ranks' queries contribute.
    """
    document_ND = gather_rows(document_QD)
    hash_N = gather_rows(text_hash_Q)
    counts = gather_rows(torch.tensor([len(query_QD)], device=query_QD.device)).tolist()
    positive_Q = sum(counts[: rank()]) + torch.arange(len(query_QD), device=query_QD.device)
    excluded_QN = text_hash_Q[:, None] == hash_N[None, :]
    excluded_QN[torch.arange(len(query_QD), device=query_QD.device), positive_Q] = False
    return info_nce(query_QD, document_ND, positive_Q, scale=scale, excluded_QN=excluded_QN)
