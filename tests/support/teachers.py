"""A sentence-transformers model built from config, as a teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from tests.support.tiny import tiny_tokenizer


def save_teacher(folder: Path, width: int = 24) -> Path:
    """One layer, mean pooling, weights large enough to tell texts apart."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=400,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(width)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "teacher"))
    return folder / "teacher"
