"""Tiny encoders of every type that llama.cpp runs, and tokenizers of every way of cutting that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from llm2vec_ds import Encoder, EncoderSettings
from llm2vec_ds.export.gguf.architecture import TYPES
from llm2vec_ds.export.gguf.export import TOKENS_OF_ALL_KINDS
from llm2vec_ds.export.gguf.pre_tokenizer import DIGIT, GPT2, Cut
from llm2vec_ds.model.bidirectional import with_causal
from tests.support.model_types import ATTENTION
from tests.support.tiny import sentences, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 512,
        **ALTERNATING,
    },
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 16, **ALTERNATING},
    "phi3": {"sliding_window": None},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
KINDS = tuple(TYPES)
SPECIAL = ["<s>", "</s>", "<pad>"]


def trunk(kind: str, **changes: Any) -> Any:
    """Random, with weights large enough to tell texts and orders of tokens apart."""
    config = AutoConfig.for_model(kind, **{**SIZES, **CHANGES.get(kind, {}), **changes})
    torch.manual_seed(0)
    found = AutoModel.from_config(with_causal(config, False), attn_implementation=ATTENTION).eval()
    with torch.no_grad():  # norms begin as ones (Gemma: zeros), under which a forgotten offset could hide
        for name, weight in found.named_parameters():
            if name.endswith("norm.weight"):
                weight += 0.3 * torch.randn_like(weight)
            if name.endswith("bias"):
                weight.normal_(std=0.2)
    return found


def save(
    folder: Path, kind: str = "llama", tokenizer: Any = None, changes: Any = None, **settings: Any
) -> Path:
    """An encoder folder."""
    Encoder(
        trunk(kind, **(changes or {})), tokenizer or tiny_tokenizer(False), EncoderSettings(**settings)
    ).save(folder)
    return folder


def byte_level_tokenizer(cut: Cut) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts texts so, trained on texts in which ways of cutting differ."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut.whole_words))
    steps: list[Any] = []
    for regex in cut.regexes:
        if regex == DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif regex != GPT2:
            steps.append(pre_tokenizers.Split(Regex(regex), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in cut.regexes))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*sentences(50), *TOKENS_OF_ALL_KINDS * 3], trainer)
    return _wrapped(tokenizer)


def sentence_piece_tokenizer(blank_before: bool) -> PreTrainedTokenizerFast:
    """What a SentencePiece model is in tokenizer.json: Llama 2's (with a blank before a text) or Gemma's."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    trained.train_from_iterator([f" {text}" for text in sentences(50)], trainer)
    known = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    tokens = [*known[:4], *(f"<0x{byte:02X}>" for byte in range(256)), *known[4:]]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in known[4:]
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if blank_before else replace
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
