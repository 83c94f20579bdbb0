"""InfoNCE over the global batch: every rank's queries against every rank's documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from llm2vec_kernels.info_nce import info_nce as info_nce_of_products

from llm2vec_ds.distributed import gather_rows, rank


def info_nce(
    query_QD: torch.Tensor,
    document_ND: torch.Tensor,
    positive_Q: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    query_id_Q: torch.Tensor | None = None,
    document_id_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """−log softmax of scale · cosine at each query's positive, `[Q]` fp32 (van den Oord et al., 2018).

    The Q×N scores are never held: `llm2vec_kernels.info_nce`.

    Args:
        positive_Q: row of `document_ND` that is right for each query.
        scale: the inverse temperature; a tensor is learned.
        query_id_Q: id of each query's positive; a document of the same id in `document_id_N` is neither
            positive nor negative, unless it is the positive itself.
    """
    query_QD, document_ND = F.normalize(query_QD.float(), dim=-1), F.normalize(document_ND.float(), dim=-1)
    return info_nce_of_products(
        query_QD, document_ND, positive_Q, scale=scale, query_id_Q=query_id_Q, document_id_N=document_id_N
    ).loss_Q


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
    return info_nce(
        query_QD, document_ND, positive_Q, scale=scale, query_id_Q=text_hash_Q, document_id_N=hash_N
    )


def matryoshka_prefixes(x_ND: torch.Tensor, widths: Sequence[int]) -> Iterator[torch.Tensor]:
    """The first `width` components of each vector, at length 1 again (Matryoshka, arXiv 2205.13147).

    The loss over them is the sum of one loss for each width.
    """
    for width in widths:
        yield F.normalize(x_ND[:, :width].float(), dim=-1)
