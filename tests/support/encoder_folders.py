"""Encoder folders of many kinds to export, texts for them, and how near two sets of vectors are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import processors

from llm2vec_ds import Encoder, EncoderSettings
from tests.support.tiny import sentences, tiny_llama, tiny_tokenizer

TEXTS = [f"{a} {b}" for a, b in zip(sentences(200, 1), sentences(200, 2), strict=True)]
TEXTS[0], TEXTS[1], TEXTS[2] = "bread", " ".join(sentences(40, 3)), "9 trains"


def make(folder: Path, *, bos: bool = False, eos: bool = False, pad: bool = True, **settings: Any) -> Path:
    """An encoder folder."""
    tokenizer = tiny_tokenizer(bos)
    if eos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    if not pad:
        tokenizer.pad_token = None
    trunk = tiny_llama(max_position_embeddings=1024).model
    trunk.config.is_causal = False
    Encoder(trunk, tokenizer, EncoderSettings(**settings)).save(folder)
    return folder


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(a), np.float64(b)))
    return (a * b).sum(axis=1)
