"""Token dropout: each pass of a text leaves out some of its tokens (token cutoff, arXiv 2105.11741)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llm2vec_ds.data.prompts import TokenizedText


def with_tokens_left_out(text: TokenizedText, share: float, key: Sequence[int]) -> TokenizedText:
    """Returns the text without a random `share` of its own tokens. At least one token stays.

    Tokens that are not pooled stay: the instruction, the template and special tokens. What is left out
    depends on `key` alone. So it is the same on every rank, and in a resumed run.
    """
    random = np.random.default_rng(np.random.SeedSequence(key))
    stays = random.random(text.pool_end - text.pool_start) >= share
    if not stays.any():
        stays[random.integers(len(stays))] = True
    ids = np.asarray(text.input_ids)
    before, own, after = np.split(ids, [text.pool_start, text.pool_end])
    kept = np.concatenate([before, own[stays], after])
    return replace(text, input_ids=kept.tolist(), pool_end=text.pool_start + int(stays.sum()))
