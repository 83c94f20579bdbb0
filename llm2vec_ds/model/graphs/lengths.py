"""The few lengths that micro-batches are filled up to, so that few graphs serve all of them."""

from __future__ import annotations

import math
from bisect import bisect_left

RATIO = 1.25
"""Between neighbours, at most: what is filled up costs a quarter more at worst."""
MULTIPLE = 16
"""Of all lengths: kernels load 16 bytes at a time, and tensor cores take rows in such numbers."""
SHORTEST = 64


def lengths_up_to(longest: int) -> list[int]:
    """Ascending; the last one holds `longest` tokens.

    They are counted from the longest down: most micro-batches are nearly full.
    """
    found = [_rounded(longest)]
    while found[-1] > SHORTEST:
        found.append(max(_rounded(found[-1] / RATIO), SHORTEST))
    return found[::-1]


def length_for(n_tokens: int, lengths: list[int]) -> int | None:
    """The shortest length that holds so many tokens; None: none does."""
    place = bisect_left(lengths, n_tokens)
    return lengths[place] if place < len(lengths) else None


def _rounded(length: float) -> int:
    return math.ceil(length / MULTIPLE) * MULTIPLE
