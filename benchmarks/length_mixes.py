"""Lengths of real texts in tokens, and texts of such lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

# Percentiles of lengths with the SmolLM2 tokenizer, measured on the 17,256 sentences of STS-B and the 4,024
# paragraphs of WikiText-2's validation and test files.
PERCENTILES = (0, 1, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
STS_SENTENCES = (3, 5, 7, 8, 11, 16, 25, 31, 42, 52, 72)
WIKI_PARAGRAPHS = (1, 3, 17, 68, 131, 201, 270, 319, 428, 503, 587)
# The same files' 124 articles give 1,201 blocks of 512 tokens. This share is full. The rest end an article.
FULL_BLOCKS = 0.897
MIXES = ("sts", "wiki", "blocks", "long")


def length_mix(name: str, tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Returns lengths of one of `MIXES` that sum to `tokens`, longest first as in the packer."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(drawn_length(name, draw), left))
    return tuple(sorted(lengths, reverse=True))


def drawn_lengths(name: str, n_texts: int, seed: int = 0) -> list[int]:
    """Returns lengths of `n_texts` texts, of one of `MIXES` or `triplets`."""
    draw = random.Random(seed)
    return [drawn_length(name, draw) for _ in range(n_texts)]


def drawn_length(name: str, draw: random.Random) -> int:
    """Draws a length. `triplets`: 8 to 300, more short than long ones. `long`: 1,024 to 4,096, uniform."""
    if name == "blocks":
        return 512 if draw.random() < FULL_BLOCKS else draw.randint(1, 511)
    if name == "long":
        return draw.randint(1024, 4096)
    if name == "triplets":
        return round(math.exp(draw.uniform(math.log(8), math.log(300))))
    return _from_percentiles(STS_SENTENCES if name == "sts" else WIKI_PARAGRAPHS, draw.random())


def _from_percentiles(lengths: tuple[int, ...], share: float) -> int:
    """Interpolates linearly between the percentiles."""
    for (p0, x0), (p1, x1) in pairwise(zip(PERCENTILES, lengths, strict=True)):
        if 100 * share <= p1:
            return round(x0 + (x1 - x0) * (100 * share - p0) / (p1 - p0))
    return lengths[-1]


def scaled(lengths: Sequence[int], tokens: int, longest: int) -> list[int]:
    """Scales lengths so that they sum to `tokens`, none above `longest`."""
    factor = tokens / sum(lengths)
    made = [max(1, min(longest, round(length * factor))) for length in lengths]
    for i in range(len(made)):  # the remainder of rounding
        made[i] = max(1, min(longest, made[i] + tokens - sum(made)))
    return made


def text_of(length: int, vocab: int, draw: random.Random) -> str:
    """Returns `length` words of `random_model.write_tokenizer`, one token each."""
    return " ".join(f"w{draw.randrange(vocab - 3)}" for _ in range(length))
