"""Tiny models and tokenizers built from config: no download, a second or less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the river runs past an old mill where children fish for trout and bread is baked on sundays "
    "a train to the coast leaves at nine while rain falls on green hills and nobody waits outside "
    "my neighbour repairs clocks paints doors grows beans and never sells a single thing he makes"
).split()


def sentences(n: int, seed: int = 0) -> list[str]:
    """`n` distinct word salads of 3 to 20 words."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, None] = {}
    while len(made) < n:
        length = int(torch.randint(3, 21, (), generator=generator))
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        made[" ".join(WORDS[i] for i in picks)] = None
    return list(made)


def tiny_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 tokens; with `bos`, `<s>` stands before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(50), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, width 32, 4 query and 2 key/value heads; weights large enough to tell texts apart."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**values))


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """A model folder with tokenizer, as `from_pretrained` reads it."""
    tiny_llama(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def text_file(folder: Path) -> Path:
    """Paragraphs of three sentences each, as `training_text` wants them."""
    picked = [s[:80].strip().capitalize() + "." for s in sentences(300) if len(s) > 30]
    paragraphs = [" ".join(picked[i : i + 3]) for i in range(0, len(picked) - 3, 3)]
    path = folder / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n")
    return path
