"""Finds llama.cpp's name for a byte-level pre-tokenizer: the part that splits texts before the merges.

llama.cpp has names for ways of splitting (`tokenizer.ggml.pre`), in its `src/llama-vocab.cpp`. Its own
converter finds the name by the token ids of one text, in a table of known models. Here, tokenizer.json
decides: its regular expressions must be the ones behind the name. Other tokenizers are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2vec_ds.errors import UserError

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    """The regular expression of GPT-4's `cl100k` and its relatives. `digits`: how many stay together."""
    return rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}"


def _cased(endings: str, digits: str) -> str:
    """The regular expression of GPT-4o's `o200k` and its relatives. A word ends where its case changes."""
    first = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{endings}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{endings}"
    )
    return rf"{first}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"


@dataclass(frozen=True)
class Cut:
    """A way of splitting texts.

    Attributes:
        regexes: regular expressions in their order. `gpt2` stands for the one built into the byte level.
        whole_words: True if a word that is a token stays whole, without merges (`ignore_merges`).
    """

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
"""For these names, llama.cpp's regular expressions do not count a combining mark as a letter."""


def pre_tokenizer_notes(name: str) -> list[str]:
    """Returns notes on what llama.cpp does differently under this name."""
    if name not in CUT_AT_MARKS:
        return []
    return [
        "llama.cpp splits words at combining marks (in Hindi, Thai, …) and this tokenizer does not: vectors "
        "of such texts differ."
    ]


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Returns the name for a tokenizer.json with a byte-level BPE.

    Raises:
        UserError: llama.cpp has no name for this way of splitting, or the name is not known here.
    """
    cut = Cut(tuple(_regexes(tokenizer["pre_tokenizer"])), bool(tokenizer["model"].get("ignore_merges")))
    if cut not in NAMES:
        raise UserError(
            f"--format gguf: llama.cpp has no known name for a tokenizer that splits texts by {cut.regexes}"
            f"{' and keeps known words whole' if cut.whole_words else ''}: use --format sentence-transformers"
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
