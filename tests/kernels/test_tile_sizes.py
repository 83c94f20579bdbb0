"""Which tiles a head dim takes."""

from __future__ import annotations

import pytest
import torch
from llm2vec_kernels.attention.tile_sizes import (
    CARDS,
    FLOAT_TILES,
    HALF_TILES,
    HOPPER,
    SHORT_HALF_TILES,
    SHORT_TEXT_TOKENS,
    Card,
    Tile,
    Tiles,
    padded_head_dim,
    tiles_for,
)

TABLES = [
    *[(HALF_TILES[card], card, torch.bfloat16, 512) for card in CARDS],
    (SHORT_HALF_TILES, HOPPER, torch.float16, SHORT_TEXT_TOKENS),
    (FLOAT_TILES, HOPPER, torch.float32, 512),
]


@pytest.mark.parametrize(("table", "card", "dtype", "max_seqlen"), TABLES)
def test_a_head_dim_takes_the_next_row_of_its_table(
    table: dict[int, Tiles],
    card: Card,
    dtype: torch.dtype,
    max_seqlen: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever its order; a row of its own for 96, so that it can be tuned without 128."""
    assert 96 in table
    named = {width: Tiles(*[Tile(width, kernel, 4, 1) for kernel in range(3)]) for width in table}
    for width in reversed(named):
        monkeypatch.delitem(table, width)
        monkeypatch.setitem(table, width, named[width])
    for head_dim in range(1, max(table) + 1):
        taken = tiles_for(card, dtype, head_dim, max_seqlen).forward.rows
        assert taken == min(width for width in table if width >= head_dim)


def test_texts_are_short_only_where_there_is_a_row_for_it() -> None:
    assert max(SHORT_HALF_TILES) == 128
    assert tiles_for(HOPPER, torch.bfloat16, 129, SHORT_TEXT_TOKENS) is HALF_TILES[HOPPER][256]
    assert tiles_for(HOPPER, torch.bfloat16, 96, SHORT_TEXT_TOKENS + 1) is HALF_TILES[HOPPER][96]


def test_tiles_stay_a_power_of_two_wide() -> None:
    assert [padded_head_dim(head_dim) for head_dim in (1, 16, 64, 65, 96, 128, 256)] == [
        16, 16, 64, 128, 128, 128, 256,
    ]  # fmt: skip
