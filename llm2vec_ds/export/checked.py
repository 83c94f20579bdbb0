"""Texts whose vectors an export must give, and the comparison that says whether it does."""

from __future__ import annotations

import logging

import numpy as np

from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.sts import own_graded_pairs

log = logging.getLogger(__name__)

N_CHECKED_TEXTS = 24


def checked_texts() -> list[str]:
    """Mixed lengths: single words, sentences, and some as long as several."""
    pairs = own_graded_pairs()
    sentences = list(dict.fromkeys(pairs.first + pairs.second))[:N_CHECKED_TEXTS]
    return ["word", *sentences, " ".join(sentences), " ".join(sentences[:5])]


def compare(reader: str, prompt: str | None, found: np.ndarray, expected: np.ndarray, lowest: float) -> None:
    """Of the vectors that another tool gives, `[N, D]`, and the encoder's.

    Raises:
        UserError: a cosine is under `lowest`, or there is nothing to compare.
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(found), np.float64(expected)))
    cosine = float((a * b).sum(axis=1).min(initial=1.0 if len(a) else 0.0))
    words = f" with prompt {prompt!r}" if prompt else ""
    log.info("checked: %s%s gives the encoder's vectors, lowest cosine %.6f", reader, words, cosine)
    if not cosine >= lowest:
        raise UserError(
            f"{reader}{words} does not give the encoder's vectors (lowest cosine {cosine:.4f}, expected "
            f"{lowest}): nothing was exported"
        )
