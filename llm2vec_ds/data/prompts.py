"""Texts with instructions → token ids and the span of tokens that count for the text's vector."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm2vec_ds.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A text, and an instruction that is attended but not pooled."""

    instruction: str | None
    text: str

    def render(self) -> tuple[str, int]:
        """The one string that is tokenised, and the character where the text begins in it."""
        prefix = f"{self.instruction.strip()} " if self.instruction else ""
        return prefix + self.text, len(prefix)

    def hash(self) -> int:
        """63 bits of SHA-256: equal for equal texts on every machine."""
        digest = hashlib.sha256("\0".join([self.instruction or "", self.text]).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class TokenizedText:
    """Ids of one text with its special tokens; tokens `pool_start:pool_end` are the text itself."""

    input_ids: Sequence[int]
    pool_start: int
    pool_end: int
    text_hash: int

    def __len__(self) -> int:
        return len(self.input_ids)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses tokenizers without character offsets, which the span of a text needs."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets: use a model with a tokenizer.json "
            "(a fast tokenizer), or convert it with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )


def tokenize(tokenizer: Any, prompts: Sequence[Prompt]) -> list[TokenizedText]:
    """Instruction and text as one string each; the boundary from the tokenizer's offsets.

    A token that begins before the boundary and ends after it (the space of " word") belongs to the
    text. Special tokens that the tokenizer adds are never pooled. A text without tokens has
    `pool_start == pool_end`.
    """
    rendered = [prompt.render() for prompt in prompts]
    encoded = tokenizer(
        [string for string, _ in rendered],
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    texts = []
    for row, (prompt, (_, boundary)) in enumerate(zip(prompts, rendered, strict=True)):
        special = encoded["special_tokens_mask"][row]
        own = [
            i
            for i, (_, end) in enumerate(encoded["offset_mapping"][row])
            if end > boundary and not special[i]
        ]
        start, end = (own[0], own[-1] + 1) if own and prompt.text.strip() else (0, 0)
        texts.append(TokenizedText(encoded["input_ids"][row], start, end, prompt.hash()))
    return texts


def truncate(text: TokenizedText, max_tokens: int) -> TokenizedText:
    """Cuts the end of the text itself; instruction and special tokens stay whole."""
    return next(split(text, max_tokens))


def split(text: TokenizedText, max_tokens: int) -> Iterator[TokenizedText]:
    """Blocks of at most `max_tokens`, each with the instruction and special tokens around it.

    Raises:
        UserError: instruction and special tokens leave no room for text.
    """
    if len(text) <= max_tokens:
        yield text
        return
    head, tail = list(text.input_ids[: text.pool_start]), list(text.input_ids[text.pool_end :])
    room = max_tokens - len(head) - len(tail)
    if room < 1:
        raise UserError(
            f"instruction and special tokens take {len(head) + len(tail)} of max_tokens={max_tokens}: "
            "raise max_tokens or shorten the instruction"
        )
    body = text.input_ids[text.pool_start : text.pool_end]
    for start in range(0, len(body), room):
        block = list(body[start : start + room])
        block_hash = text.text_hash if start == 0 else (text.text_hash + start) % 2**63
        yield TokenizedText(head + block + tail, len(head), len(head) + len(block), block_hash)
