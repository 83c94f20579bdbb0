"""Word dropout: each pass of a text leaves out some of its words (cf. token cutoff, arXiv 2105.11741)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llm2vec_ds.data.prompts import TokenizedText


class WordDropout:
    """Leaves out a random `share` of a text's own words. At least one word stays.

    Tokens that are not pooled stay: the instruction, the template and special tokens.
    """

    def __init__(self, tokenizer: Any, share: float) -> None:
        self._starts_word = WordStarts(tokenizer)
        self._share = share

    def __call__(self, text: TokenizedText, key: Sequence[int]) -> TokenizedText:
        """Returns the text without some words.

        What is left out depends on `key` alone. So it is the same on every rank, and in a resumed run.
        """
        before, own, after = np.split(np.asarray(text.input_ids), [text.pool_start, text.pool_end])
        word_of_token = self._starts_word(own)[1:].cumsum()
        word_of_token = np.concatenate([[0], word_of_token])
        n_words = int(word_of_token[-1]) + 1
        random = np.random.default_rng(np.random.SeedSequence(key))
        word_stays = random.random(n_words) >= self._share
        if not word_stays.any():
            word_stays[random.integers(n_words)] = True
        own = own[word_stays[word_of_token]]
        kept = np.concatenate([before, own, after]).tolist()
        return replace(text, input_ids=kept, pool_end=text.pool_start + len(own))


class WordStarts:
    """Tells which tokens start a word. It asks the tokenizer once for each token.

    A token starts a word if its text begins with a space. Many languages have no spaces. So a token also
    starts a word if it begins with a letter of a script without upper and lower case (Chinese, Thai), or with
    part of a character.
    """

    _UNKNOWN = -1

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known = np.full(len(tokenizer), self._UNKNOWN, dtype=np.int8)
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor_length = len(self._decoded([]))

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Returns a bool for each of `ids [T]`."""
        for token in np.unique(ids[self._known[ids] == self._UNKNOWN]).tolist():
            self._known[token] = self._starts_word(token)
        return self._known[ids] == 1

    def _starts_word(self, token: int) -> bool:
        """Decodes the token after another one. Alone, some tokenizers decode it without its space."""
        first = self._decoded([token])[self._anchor_length :][:1]
        return first.isspace() or first == "\ufffd" or (first != "" and unicodedata.category(first) == "Lo")

    def _decoded(self, ids: list[int]) -> str:
        found: str = self._tokenizer.decode([*self._anchor, *ids], clean_up_tokenization_spaces=False)
        return found
