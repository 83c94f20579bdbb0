"""A cross-encoder built from config."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.support.tiny import tiny_tokenizer


def save_reranker(folder: Path, num_labels: int = 1) -> Path:
    """One layer, weights large enough to tell pairs apart."""
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,
        num_labels=num_labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    return folder
