"""Measures retrieval: do the passages that answer a query rank near the top of all passages?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm2vec_ds.encoder.encoder import Encoder


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, passages, and which passages answer which query: `relevant [queries, passages]` bool."""

    queries: list[str]
    passages: list[str]
    relevant: np.ndarray


def ndcg_at_10(encoder: Encoder, data: RetrievalSet, *, progress: bool = False) -> float:
    """Returns the mean nDCG@10 (Järvelin & Kekäläinen, 2002), with cosine similarity as the score."""
    from sklearn.metrics import ndcg_score

    queries = encoder.encode(data.queries, normalize=True, show_progress=progress)
    passages = encoder.encode(data.passages, normalize=True, show_progress=progress)
    return float(ndcg_score(data.relevant.astype(int), queries @ passages.T, k=10))
