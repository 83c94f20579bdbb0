"""How a byte-level tokenizer cuts a text before it merges → the name that llama.cpp has for it.

llama.cpp knows ways of cutting by names (`tokenizer.ggml.pre`) that stand in its code, `src/llama-vocab.cpp`.
Its own converter finds the name by the token ids of one text, in a table of known models. Here it is found in
tokenizer.json: what cuts there and what cuts under the name must be the same expressions. Others are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2vec_ds.errors import UserError

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    """The expression of GPT-4's `cl100k` and its relatives: `digits` digits stand together."""
    return rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}"


def _cased(endings: str, digits: str) -> str:
    """The expression of GPT-4o's `o200k` and its relatives: a word ends where its case changes."""
    first = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{endings}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{endings}"
    )
    return rf"{first}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"


@dataclass(frozen=True)
class Cut:
    """`regexes`: in their order, `gpt2` being the one built into the byte level. `whole_words`: a word that
    is a token is taken whole, without merges (`ignore_merges`)."""

    regexes: tuple[str, ...]
    whole_words: bool


GPT2, DIGIT = "gpt2", "digit"
NAMES = {
    Cut((GPT2,), False): "gpt-2",
    Cut((DIGIT, GPT2), False): "smollm",
    Cut((_words("{1,3}"),), True): "llama-bpe",
    Cut((_words("{1,3}"),), False): "smaug-bpe",
    Cut((_words(""),), False): "qwen2",
    Cut((_cased("", ""),), True): "tekken",
    Cut((_cased(f"{ENDINGS}?", "{1,3}"),), False): "gpt-4o",
}
CUT_AT_MARKS = ("tekken", "gpt-4o")
"""llama.cpp's expressions for these take a combining mark for no letter."""


def pre_tokenizer_notes(name: str) -> list[str]:
    """What llama.cpp does otherwise under a name."""
    if name not in CUT_AT_MARKS:
        return []
    return [
        "llama.cpp cuts words at combining marks (in Hindi, Thai …), this tokenizer does not: vectors of "
        "such texts differ."
    ]


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Of a tokenizer.json with a byte-level BPE.

    Raises:
        UserError: llama.cpp has no name for its way of cutting, or none is known here.
    """
    cut = Cut(tuple(_regexes(tokenizer["pre_tokenizer"])), bool(tokenizer["model"].get("ignore_merges")))
    if cut not in NAMES:
        raise UserError(
            f"--format gguf: no name of llama.cpp is known for a tokenizer that cuts texts by {cut.regexes}"
            f"{' and takes known words whole' if cut.whole_words else ''}: use --format sentence-transformers"
        )
    return NAMES[cut]


def _regexes(part: dict[str, Any]) -> list[str]:
    kind = part["type"]
    if kind == "Sequence":
        return [found for inner in part["pretokenizers"] for found in _regexes(inner)]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return [GPT2] if part.get("use_regex", True) else []
    if kind == "Digits" and part["individual_digits"]:
        return [DIGIT]
    if (
        kind == "Split"
        and part["behavior"] == "Isolated"
        and not part["invert"]
        and "Regex" in part["pattern"]
    ):
        return [str(part["pattern"]["Regex"])]
    return [f"a {kind} that is { ({k: v for k, v in part.items() if k != 'type'}) }"]
