"""Tile sizes of the attention kernels, by head dim, dtype and the shared memory of the card.

Fixed tables instead of autotuning: a run starts at once, and every rank and every restart computes with
the same tiles. Each entry is compiled offline for its card in `tests/kernels/test_flash_compile.py`, which
holds its shared memory to the card's limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

SHORT_TEXT_TOKENS = 64
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tile:
    """`rows` tokens that a program owns, `columns` tokens that it visits at a time (see `flash_tiles`)."""

    rows: int
    columns: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """One tile for each kernel: rows are queries in `forward` and `dq`, keys in `dkdv`."""

    forward: Tile
    dq: Tile
    dkdv: Tile


@dataclass(frozen=True)
class Card:
    """A class of GPU: those with at least this much shared memory for one program."""

    name: str
    shared_bytes: int


CONSUMER = Card("consumer (RTX 30/40/50, A10, L4, L40S)", 101_376)
AMPERE = Card("A100", 166_912)
HOPPER = Card("H100, H200, B200", 232_448)
CARDS = (HOPPER, AMPERE, CONSUMER)

# (card, bytes of an element, padded head dim) → tiles for texts of any length
TILES: dict[tuple[Card, int, int], Tiles] = {}
INTERPRETER_TILES = Tiles(Tile(32, 16), Tile(32, 16), Tile(16, 32))


def padded_head_dim(head_dim: int) -> int:
    """The power of two that tiles of this head dim are as wide as; `tl.dot` needs at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(device: torch.device, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Tiles:
    """The tiles of a call."""
    return INTERPRETER_TILES
