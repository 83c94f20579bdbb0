"""The model that teaches: text in, vectors out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.settings import SETTINGS_FILE
from llm2vec_ds.model.from_sentence_transformers import load_sentence_transformer

log = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
"""Texts → `[texts, width]` fp32."""

TEXTS_PER_PASS = 32


def load_teacher(path: str, prompt: str | None, device: torch.device) -> Encode:
    """An encoder of this toolkit, else a sentence-transformers model.

    Args:
        prompt: put before each text; of an encoder of this toolkit its instruction, which is not pooled.

    Raises:
        UserError: no such model, or it cannot be loaded.
    """
    if (Path(path) / SETTINGS_FILE).is_file():
        encoder = Encoder.from_pretrained(path, device=device)
        log.info("teacher %s: an encoder of this toolkit", path)
        return lambda texts: encoder.encode(texts, instruction=prompt)
    model = load_sentence_transformer(path, "distil.teacher", device)
    log.info("teacher %s: sentence-transformers, %s", path, ", ".join(type(m).__name__ for m in model))

    def encode(texts: list[str]) -> np.ndarray:
        found = model.encode(texts, prompt=prompt, batch_size=TEXTS_PER_PASS, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    return encode
