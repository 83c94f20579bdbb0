"""Converts a fast tokenizer to the vocabulary that llama.cpp reads.

There are two kinds. The first is BPE over bytes, as in GPT-2 (llama.cpp calls it "gpt2"). The second is BPE
with a fallback to bytes, which a SentencePiece model becomes in tokenizer.json (llama.cpp calls it "llama").

For the second kind llama.cpp has scores instead of a list of merges. Two neighbours merge if their union is a
token. The union with the best score merges first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from llm2vec_ds.data.prompts import added_ids
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.gguf.pre_tokenizer import pre_tokenizer_name, pre_tokenizer_notes

FIX = "use --format sentence-transformers"
BLANK = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NO_TOKEN = "[unused_{}]"
"""Name of an embedding row that has no token in the tokenizer."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        keys: GGUF's keys under `tokenizer.ggml.`.
        notes: what llama.cpp does in another way than the tokenizer.
    """

    keys: dict[str, Any]
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: Any, n_rows: int, *, special_tokens: bool, end_with_eos: bool) -> Vocabulary:
    """Returns a vocabulary of `n_rows` tokens, one for each row of the embedding.

    Args:
        special_tokens: whether texts get the tokens that the tokenizer adds before and after.
        end_with_eos: whether every text ends with the end-of-sequence token.

    Raises:
        UserError: llama.cpp cannot express this tokenizer.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise UserError(f"--format gguf: this tokenizer of type {model['type']} is not supported: {FIX}")
    tokens, types = _tokens(tokenizer, said, n_rows)
    of_kind, notes = _sentence_piece(said, tokens) if model.get("byte_fallback") else _byte_level(said)
    ends = _ends(tokenizer, special_tokens, end_with_eos)
    return Vocabulary({**of_kind, "tokens": tokens, "token_type": types, **ends}, tuple(notes))


def _tokens(tokenizer: Any, said: dict[str, Any], n_rows: int) -> tuple[list[str], list[int]]:
    """Returns name and type of every id."""
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if (highest := max(names)) >= n_rows:
        raise UserError(
            f"--format gguf: token {names[highest]!r} has id {highest}, but the embedding has only {n_rows} "
            "rows: use the model's own tokenizer"
        )
    names |= {i: NO_TOKEN.format(i) for i in range(n_rows) if i not in names}
    types = dict.fromkeys(range(n_rows), TokenType.NORMAL)
    types |= {i: TokenType.UNUSED for i in range(n_rows) if names[i] == NO_TOKEN.format(i)}
    if said["model"].get("byte_fallback"):
        types |= {i: TokenType.BYTE for i, name in names.items() if BYTE.fullmatch(name)}
    for added in said["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UserError(
                f"--format gguf: token {added['content']!r} takes spaces around it or only whole words, and "
                f"llama.cpp cannot do that: {FIX}"
            )
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = said["model"].get("unk_token")
    types |= {i: TokenType.UNKNOWN for i, name in names.items() if name == unknown}
    return [names[i] for i in range(n_rows)], [int(types[i]) for i in range(n_rows)]


def _ends(tokenizer: Any, special_tokens: bool, end_with_eos: bool) -> dict[str, Any]:
    before, after = added_ids(tokenizer) if special_tokens else ([], [])
    if end_with_eos and after[-1:] != [tokenizer.eos_token_id]:
        after = [*after, tokenizer.eos_token_id]
    if len(before) > 1 or len(after) > 1:
        raise UserError(
            "--format gguf: llama.cpp adds at most one token before a text and one after it, but the "
            f"tokenizer adds {len(before)} and {len(after)}: {FIX}"
        )
    ids = {
        "bos_token_id": before[0] if before else tokenizer.bos_token_id,
        "eos_token_id": after[0] if after else tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    given = {key: int(value) for key, value in ids.items() if value is not None}
    return {**given, "add_bos_token": bool(before), "add_eos_token": bool(after)}


def _byte_level(said: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    normalizer = said["normalizer"]
    notes = []
    if normalizer == {"type": "NFC"}:
        notes.append("llama.cpp does not convert texts to Unicode NFC: convert them before you send them.")
    elif normalizer is not None:
        raise UserError(f"--format gguf: llama.cpp has no normalizer of type {normalizer['type']}: {FIX}")
    name = pre_tokenizer_name(said)
    merges = [" ".join(pair) for pair in _pairs(said["model"])]
    return {"model": "gpt2", "pre": name, "merges": merges}, [*notes, *pre_tokenizer_notes(name)]


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the merges as pairs. Older files store a merge as one string."""
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in merges]


def _sentence_piece(said: dict[str, Any], tokens: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the keys of the "llama" kind. A token's score is minus the rank of its earliest merge.

    So llama.cpp applies merges in the tokenizer's order.
    """
    pairs = _pairs(said["model"])
    rank_of: dict[str, int] = {}
    for rank, (first, second) in enumerate(pairs):
        rank_of.setdefault(first + second, rank)
    _check_all_ways(rank_of.keys(), set(pairs), said["model"]["vocab"])
    scores = [-float(rank_of.get(token, len(pairs))) for token in tokens]
    prefix = _blank_before(said)
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}, []


def _check_all_ways(made: Any, pairs: set[tuple[str, str]], vocab: dict[str, int]) -> None:
    """Refuses a tokenizer if llama.cpp would also merge two tokens that have no merge in it."""
    for token in made:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in pairs and pair[0] in vocab and pair[1] in vocab:
                raise UserError(
                    f"--format gguf: llama.cpp would merge {pair[0]!r} and {pair[1]!r} into token {token!r}, "
                    f"which this tokenizer never does: {FIX}"
                )


def _blank_before(said: dict[str, Any]) -> bool:
    """Returns whether the tokenizer puts a space before a text.

    Raises:
        UserError: the tokenizer does more to texts than to write spaces as `▁`.
    """
    steps = [*_steps(said["normalizer"], "normalizers"), *_steps(said["pre_tokenizer"], "pretokenizers")]
    before = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == BLANK:
            before = True
        elif kind == "Metaspace" and step["replacement"] == BLANK and not step.get("split", True):
            before = before or step["prepend_scheme"] in ("always", "first")
        elif kind == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, BLANK):
            pass
        elif kind == "Split" and step["pattern"] == {"String": " "}:
            pass  # Gemma's split at spaces does nothing: the normalizer has replaced all spaces
        else:
            raise UserError(
                f"--format gguf: llama.cpp does not support the step {kind} of this tokenizer: {FIX}"
            )
    return before


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return (
        [step for inner in part[name] for step in _steps(inner, name)]
        if part["type"] == "Sequence"
        else [part]
    )
