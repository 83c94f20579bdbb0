"""A rank's examples as packed micro-batches, and the way back from vectors to examples."""

from __future__ import annotations

import numpy as np
import torch

from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prompts import TokenizedText


class PackedExamples:
    """Examples in micro-batches of similar lengths. Queries come first, then positives, then negatives.

    Attributes:
        n_queries, n_documents: documents are positives and negatives.
        example_of: the example of each text.
        groups: the texts of each micro-batch.
        batches: the micro-batches, on the CPU.
        ids: a hash of each text, int64.
        n_distinct: how many texts differ.
    """

    def __init__(self, examples: list[list[TokenizedText]], max_tokens: int, device: torch.device) -> None:
        """`examples`: the texts of each: query, positive, hard negatives. `device`: where they will run."""
        negatives = [text for example in examples for text in example[2:]]
        texts = [example[0] for example in examples] + [example[1] for example in examples] + negatives
        self.n_queries, self.n_documents = len(examples), len(texts) - len(examples)
        own = np.arange(len(examples))
        n_negatives = [len(example) - 2 for example in examples]
        self.example_of = np.concatenate([own, own, np.repeat(own, n_negatives)])
        self.groups = plan_micro_batches([len(text) for text in texts], max_tokens)
        self.batches = [pack([texts[i] for i in group]).ready_for(device) for group in self.groups]
        self.ids = torch.tensor([text.text_hash for text in texts], dtype=torch.int64)
        self.n_distinct = len({text.text_hash for text in texts})
        self._order = np.concatenate(self.groups)

    def in_order(self, vectors: torch.Tensor) -> torch.Tensor:
        """Puts vectors `[texts, D]`, in the order of the micro-batches, into the order of the texts."""
        return vectors[torch.from_numpy(np.argsort(self._order)).to(vectors.device)]

    def rows(self, rows: np.ndarray, group: int) -> list[int]:
        """Returns those of the examples' `rows` that have a text in a micro-batch."""
        return rows[np.unique(self.example_of[self.groups[group]])].tolist()

    def not_finite(self, rows: np.ndarray, vectors: torch.Tensor) -> list[int]:
        """Returns those of `rows` that have a vector with a NaN or an infinity."""
        bad = ~vectors.isfinite().all(-1).cpu().numpy()
        return rows[np.unique(self.example_of[self._order[bad]])].tolist()
