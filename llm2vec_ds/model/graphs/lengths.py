"""The lengths that micro-batches are filled up to. They are few, so few graphs serve all micro-batches."""

from __future__ import annotations

import math
from bisect import bisect_left

RATIO = 1.25
"""The largest ratio of neighbouring lengths. So filler adds at most a quarter to a pass of more than
`SHORTEST` tokens."""
MULTIPLE = 16
"""Every length is a multiple of this. Kernels load 16 bytes, and tensor cores take 16 rows at a time."""
SHORTEST = 64


def lengths_up_to(longest: int) -> list[int]:
    """Returns the lengths, ascending. The last one holds `longest` tokens.

    They are counted down from `longest`, because most micro-batches are nearly full.
    """
    found = [_rounded(longest)]
    while found[-1] > SHORTEST:
        found.append(max(_rounded(found[-1] / RATIO), SHORTEST))
    return found[::-1]


def length_for(n_tokens: int, lengths: list[int]) -> int | None:
    """Returns the shortest length that holds `n_tokens`. None if no length does."""
    place = bisect_left(lengths, n_tokens)
    return lengths[place] if place < len(lengths) else None


def _rounded(length: float) -> int:
    return math.ceil(length / MULTIPLE) * MULTIPLE
