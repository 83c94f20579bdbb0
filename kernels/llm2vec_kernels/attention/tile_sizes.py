"""Tile sizes of the attention kernels, by head dim, dtype and the shared memory of the card.

Fixed tables replace autotuning. So a run starts at once, and every rank and every restart uses the same
tiles and sums in the same order. `tests/kernels/test_compile.py` compiles each entry for its card, without
having one, and checks its shared memory against the card's limit. Among the tiles that fit, the compiler's
report of registers and spills decided. Measured time has not decided yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_HEAD_DIM = 256
SHORT_TEXT_TOKENS = 64
"""If no text is longer, fp16 and bf16 use the tiles of `SHORT_HALF_TILES`, up to the head dims in it."""


@dataclass(frozen=True)
class Tile:
    """A program owns `rows` tokens and visits `columns` tokens at a time (see `tile_ops`)."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The tile of each kernel. Rows are queries in `forward` and `dq`, and keys in `dkdv`."""

    forward: Tile
    dq: Tile
    dkdv: Tile


@dataclass(frozen=True)
class Card:
    """A class of GPUs. On them one program may use at least `shared_bytes` of shared memory."""

    name: str
    shared_bytes: int


HOPPER = Card("H100, H200, B200", 232_448)
AMPERE = Card("A100", 166_912)
CONSUMER = Card("A10, L4, L40S, RTX 30 to 50", 101_376)
CARDS = (HOPPER, AMPERE, CONSUMER)

# fp16 and bf16, by the largest head dim that an entry serves. Shared memory and registers hold tiles of q, k,
# v and sums, each as wide as the head. So tiles get smaller as heads get wider and cards smaller. A head dim
# of 96 is padded to 128. It has the entry of 128 until it is measured.
HALF_TILES: dict[Card, dict[int, Tiles]] = {
    HOPPER: {
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        96: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        256: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    AMPERE: {
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        96: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        256: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    CONSUMER: {
        64: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
        96: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
        256: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
}
# For texts of at most SHORT_TEXT_TOKENS tokens. Most of a larger tile would be masked.
SHORT_HALF_TILES = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    96: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
    128: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
}
# fp32 is multiplied without tensor cores. Registers limit these tiles, on every card.
FLOAT_TILES = {
    64: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    96: Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
    128: Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
    256: Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# Small tiles: a test in the interpreter crosses many tile borders in few steps.
INTERPRETER_TILES = Tiles(Tile(32, 16, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1))


def padded_head_dim(head_dim: int) -> int:
    """Returns the width of tiles for this head dim: a power of two, and at least 16 for matrix products."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(card: Card, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Tiles:
    """Returns the tiles of a call on a card."""
    if dtype == torch.float32:
        table = FLOAT_TILES
    elif max_seqlen <= SHORT_TEXT_TOKENS and head_dim <= max(SHORT_HALF_TILES):
        table = SHORT_HALF_TILES
    else:
        table = HALF_TILES[card]
    return table[min(largest for largest in table if head_dim <= largest)]


@lru_cache
def card_of(device: torch.device) -> Card:
    """Returns the class of a CUDA device.

    Raises:
        ValueError: the device has less shared memory than every class (compute capability below 8.0).
    """
    properties = torch.cuda.get_device_properties(device)
    # An AMD device lacks the first attribute.
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    for card in CARDS:
        if shared_bytes >= card.shared_bytes:
            return card
    raise ValueError(
        f"{properties.name} gives a program {shared_bytes} bytes of shared memory. The Triton kernels need "
        f"{CONSUMER.shared_bytes} (compute capability 8.0 or later): use the torch backend"
    )


def tiles_on(device: torch.device, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Tiles:
    """Returns the tiles of a call on a device. On a CPU these are the interpreter's."""
    if device.type != "cuda":
        return INTERPRETER_TILES
    return tiles_for(card_of(device), dtype, head_dim, max_seqlen)
