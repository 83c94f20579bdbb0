"""Loads a teacher or guide: a model that turns texts into vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.settings import SETTINGS_FILE
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.first_layers import keep_first_layers
from llm2vec_ds.model.from_sentence_transformers import load_sentence_transformer
from llm2vec_ds.model.peft_adapters import file_of

log = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
"""Texts → `[texts, width]` fp32."""

TEXTS_PER_PASS = 32


def load_teacher(
    path: str, key: str, prompt: str | None, device: torch.device, layer: int | None = None
) -> Encode:
    """Loads an encoder of this toolkit, or else a sentence-transformers model.

    Args:
        key: the recipe key that names the model.
        prompt: text that goes before each text. An encoder of this toolkit takes it as its instruction, which
            is not pooled.
        layer: takes the vectors after this layer. Then any decoder-only LLM is an encoder too.

    Raises:
        UserError: there is no such model or layer, or it cannot be loaded.
    """
    if layer is not None or file_of(path, SETTINGS_FILE) is not None:
        encoder = Encoder.from_pretrained(path, device=device)
        if layer is not None:
            try:
                keep_first_layers(encoder.trunk, layer)
            except UserError as error:
                raise UserError(f"{key}_layer: {error}") from None
        log.info("%s %s: %s", key, path, f"layer {layer}" if layer else "an encoder of this toolkit")
        return lambda texts: encoder.encode(texts, instruction=prompt)
    model = load_sentence_transformer(path, key, device)
    log.info("%s %s: sentence-transformers, %s", key, path, ", ".join(type(m).__name__ for m in model))

    def encode(texts: list[str]) -> np.ndarray:
        found = model.encode(texts, prompt=prompt, batch_size=TEXTS_PER_PASS, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    return encode
