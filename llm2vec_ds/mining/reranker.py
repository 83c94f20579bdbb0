"""A reranker's scores of queries and documents."""

from __future__ import annotations

import numpy as np
import torch

from llm2vec_ds.model.from_sentence_transformers import load_cross_encoder
from llm2vec_ds.process.full_memory import enough_memory

MAX_TOKENS = 512
"""Most tokens of a query and a document together, unless a command says otherwise."""


class Reranker:
    """A CrossEncoder of sentence-transformers, on the GPU if there is one."""

    def __init__(self, path: str, *, max_tokens: int = MAX_TOKENS, batch_size: int, batch_key: str) -> None:
        """Args: batch_key: the option for `batch_size`, for the error of a full memory.

        Raises:
            UserError: as `load_cross_encoder`.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_cross_encoder(path, "--reranker", device, max_tokens)
        self.batch_size, self.remedy = batch_size, f"lower {batch_key} (now {batch_size})"

    def __call__(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Returns the model's own score, without a sigmoid, for each query and document, in fp64.

        Raises:
            UserError: memory is full.
        """
        if not pairs:
            return np.empty(0)
        with enough_memory(self.remedy):
            found = self.model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
        return np.asarray(found, dtype=np.float64)
