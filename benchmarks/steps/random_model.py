"""Makes a model folder without a download: random weights, and a tokenizer of numbered words.

Speed does not depend on the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<unk>", "</s>", "_"]
"""MNTP replaces a masked token by `_`."""


def write_model(folder: Path, config: Any, dtype: torch.dtype) -> Path:
    """Writes seeded random weights of `config` (a transformers config) and a tokenizer for its vocabulary."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer: one token for each of the words `w0`, `w1`, …, and none at a text's ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(vocab_size - len(SPECIAL))]
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def small_config(layers: int, width: int, vocab: int) -> Any:
    """Returns a Llama so narrow that the number of operations counts, not their size."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        eos_token_id=1,
        pad_token_id=1,
    )
