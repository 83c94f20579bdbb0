"""Every entry of the tile tables compiles for its card and fits into its shared memory. Needs no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from llm2vec_kernels.flash_configs import (
    AMPERE,
    CARDS,
    CONSUMER,
    FLOAT_TILES,
    HALF_TILES,
    HOPPER,
    SHORT_HALF_TILES,
    SHORT_TEXT_TOKENS,
    Card,
    Tile,
    tiles_for,
)

SCRIPT = Path(__file__).parents[1] / "support" / "compile_flash.py"
DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
SM = {HOPPER: 90, AMPERE: 80, CONSUMER: 89}
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def cases_of(
    card: Card, dtype: torch.dtype, head_dim: int, max_seqlen: int = 512, options: bool = False
) -> list[dict[str, Any]]:
    """The three kernels of one call; `options`: with softcap and dropout."""
    tiles = tiles_for(card, dtype, head_dim, max_seqlen)
    fixed = {"sm": SM[card], "dtype": TRITON_NAMES[dtype], "head_dim": head_dim, "options": options}
    return [{"kernel": kernel, **tile, **fixed} for kernel, tile in asdict(tiles).items()]


def check(card: Card, cases: list[dict[str, Any]], cache: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    outcome = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    needs = [json.loads(line)["shared_bytes"] for line in outcome.stdout.splitlines()]
    assert len(needs) == len(cases)
    for case, need in zip(cases, needs, strict=True):
        assert 0 < need <= card.shared_bytes, case


def test_the_largest_head_dim_fits_a_consumer_card(tmp_path: Path) -> None:
    check(CONSUMER, cases_of(CONSUMER, torch.bfloat16, 256), tmp_path)


def test_a_padded_head_dim_with_every_option_compiles_for_hopper(tmp_path: Path) -> None:
    check(HOPPER, cases_of(HOPPER, torch.float16, 80, options=True), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_entry_fits_its_card(card: Card, tmp_path: Path) -> None:
    half, full = torch.bfloat16, torch.float32
    cases = [
        case
        for head_dim in (32, 64, 80, 128, 256)
        for max_seqlen in ((512, 64) if head_dim <= 128 else (512,))
        for case in cases_of(card, half, head_dim, max_seqlen)
    ]
    cases += [case for head_dim in (64, 96, 256) for case in cases_of(card, half, head_dim, options=True)]
    # One table for every card: the largest tiles count where there is least.
    widths = (64, 128, 256) if card is CONSUMER else (64,)
    cases += [case for head_dim in widths for case in cases_of(card, full, head_dim)]
    check(card, cases, tmp_path)


def test_table_in_the_document_is_that_of_the_code() -> None:
    """`UPDATE_DOCS=1 pytest tests/kernels/test_flash_compile.py` writes it."""

    def cell(tile: Tile) -> str:
        return f"{tile.rows} × {tile.columns}, {tile.num_warps}/{tile.num_stages}"

    half = "fp16, bf16"
    short = f"any, texts ≤ {SHORT_TEXT_TOKENS} tokens"
    tables = [(card.name, half, HALF_TILES[card]) for card in CARDS]
    tables += [(short, half, SHORT_HALF_TILES), ("any", "fp32", FLOAT_TILES)]
    rows = "\n".join(
        f"| {card} | {dtype} | ≤ {width} | {cell(tiles.forward)} | {cell(tiles.dq)} | {cell(tiles.dkdv)} |"
        for card, dtype, table in tables
        for width, tiles in table.items()
    )
    text = DOCUMENT.read_text()
    head = r"\| card \| dtype \| head dim \| forward \| dq \| dk/dv \|\n\|[-|]+\|\n"
    written = re.search(head + r"((?:\|.+\n)*)", text)
    assert written is not None
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(text.replace(written.group(1), rows + "\n"))
    else:
        assert written.group(1).strip() == rows
