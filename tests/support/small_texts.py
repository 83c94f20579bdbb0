"""Token ids of a few short texts."""

from __future__ import annotations

import torch

from llm2vec_ds.data.prompts import TokenizedText

LENGTHS = (7, 1, 12, 7, 3)


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[TokenizedText]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]
    return [TokenizedText(row, min(2, len(row) - 1), len(row), 0) for row in ids]
