"""The specification of InfoNCE, in plain PyTorch: slow, obvious, exact in the dtype of its inputs.

Shape legend: Q queries, N documents, D width.
"""

from __future__ import annotations

import torch

from llm2vec_kernels.info_nce.tiles import Guide


def info_nce(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    positive_Q: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    query_id_Q: torch.Tensor | None = None,
    document_id_N: torch.Tensor | None = None,
    score_limit_Q: torch.Tensor | None = None,
    guide: Guide | None = None,
    hardness: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns loss, hit and log-sum-exp `[Q]` over the whole Q×N matrix (arXiv 1807.03748, equation 4).

    loss = log Σ_d exp score − score of the positive. A document other than the positive is left out if its id
    is the query's, if its score is above the query's limit, or if the guide's score is above the guide's
    limit. The exp(score) of a document other than the positive counts exp(hardness · q·d) times. The gradient
    takes this factor as a constant. In a hit, the positive beats every other document.
    """
    score_QN = scale * query_QD @ document_ND.T
    positive_QN = positive_Q[:, None] == torch.arange(len(document_ND), device=positive_Q.device)
    excluded_QN = torch.zeros_like(positive_QN)
    if query_id_Q is not None and document_id_N is not None:
        excluded_QN |= query_id_Q[:, None] == document_id_N
    if score_limit_Q is not None:
        excluded_QN |= score_QN > score_limit_Q[:, None]
    if guide is not None:
        excluded_QN |= guide.query_QG @ guide.document_NG.T > guide.limit_Q[:, None]
    score_QN = score_QN.masked_fill(excluded_QN & ~positive_QN, float("-inf"))
    weight_QN = hardness * (query_QD @ document_ND.T).detach()
    lse_Q = (score_QN + weight_QN.masked_fill(positive_QN, 0.0)).logsumexp(1)
    positive_score_Q = score_QN[positive_QN]
    hit_Q = positive_score_Q > score_QN.masked_fill(positive_QN, float("-inf")).amax(1)
    return lse_Q - positive_score_Q, hit_Q, lse_Q


def log_sum_exp(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    query_id_Q: torch.Tensor | None = None,
    document_id_N: torch.Tensor | None = None,
    score_limit_Q: torch.Tensor | None = None,
    guide: Guide | None = None,
    hardness: float = 0.0,
) -> torch.Tensor:
    """Returns the log-sum-exp `[Q]` over all documents that count. None of them is a positive."""
    cosine_QN = query_QD @ document_ND.T
    score_QN = scale * cosine_QN
    excluded_QN = torch.zeros_like(score_QN, dtype=torch.bool)
    if query_id_Q is not None and document_id_N is not None:
        excluded_QN |= query_id_Q[:, None] == document_id_N
    if score_limit_Q is not None:
        excluded_QN |= score_QN > score_limit_Q[:, None]
    if guide is not None:
        excluded_QN |= guide.query_QG @ guide.document_NG.T > guide.limit_Q[:, None]
    weighted_QN = score_QN + hardness * cosine_QN.detach()
    return weighted_QN.masked_fill(excluded_QN, float("-inf")).logsumexp(1)
