"""Kernels compile for cards that are not here; attention's tiles fit into their shared memory."""

from __future__ import annotations

import itertools
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
from llm2vec_kernels.attention.tile_sizes import (
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
    padded_head_dim,
    tiles_for,
)
from llm2vec_kernels.info_nce import triton as info_nce_triton
from llm2vec_kernels.row_ops import triton as row_ops_triton

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"
DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
SM = {HOPPER: 90, AMPERE: 80, CONSUMER: 89}
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def cases_of(
    card: Card, dtype: torch.dtype, head_dim: int, max_seqlen: int = 512, options: bool = False
) -> list[dict[str, Any]]:
    """The three kernels of one call; `options`: with softcap and dropout."""
    tiles = asdict(tiles_for(card, dtype, head_dim, max_seqlen))
    return [
        {
            "kernel": kernel,
            "sm": SM[card],
            "dtype": TRITON_NAMES[dtype],
            "num_warps": tile["num_warps"],
            "num_stages": tile["num_stages"],
            "constants": {
                "D": head_dim,
                "GROUP": 4,
                "HAS_SOFTCAP": options,
                "HAS_DROPOUT": options,
                "BLOCK_M": tile["columns" if kernel == "dkdv" else "rows"],
                "BLOCK_N": tile["rows" if kernel == "dkdv" else "columns"],
                "BLOCK_D": padded_head_dim(head_dim),
            },
        }
        for kernel, tile in tiles.items()
    ]


def row_cases(card: Card, width: int, dtype: str = "bf16") -> list[dict[str, Any]]:
    """RMSNorm over `width`, gated units, rotation of heads of 128, and dropout."""
    row = row_ops_triton.row_tile(width, torch.bfloat16)
    head = row_ops_triton.row_tile(64, torch.bfloat16)
    head["HALF"], head["BLOCK"], head["Q_HEADS"] = head.pop("D"), head.pop("BLOCK_D"), 32
    head["K_HEADS"] = 8
    cases: list[tuple[str, dict[str, Any]]] = []
    for yes in (False, True):
        element = {"BLOCK": row_ops_triton.TILE_ELEMENTS, "num_warps": 4, "GELU": yes}
        cases += [("gated_unit", element), ("gated_unit_backward", element)]
        cases += [("rotate", {**head, "BACKWARD": yes}), ("rms_norm", {**row, "EPS": 1e-5, "PLUS_ONE": yes})]
        cases += [("rms_norm_backward", {**row, "WEIGHT_IS_FROZEN": yes, "PLUS_ONE": yes})]
        cases += [("drop", {"BLOCK": row_ops_triton.DROP_BLOCK, "num_warps": 4, "ADD": yes})]
    wide = "float64" if dtype == "fp64" else "float32"
    return [a_case(card, dtype, kernel, {**options, "WIDE": wide}) for kernel, options in cases]


def epilogue_cases(card: Card, n_documents: int, dtype: str, options: bool) -> list[dict[str, Any]]:
    """Both passes over a tile of InfoNCE; `options`: with ids, limits and weights."""
    tile = info_nce_triton.program_tile(n_documents)
    wide = "float64" if dtype == "fp64" else "float32"
    tile |= {"HAS_SCALE": dtype in ("bf16", "fp16"), "HAS_IDS": options, "HAS_LIMITS": options}
    cases = [("statistics", {**tile, "WIDE": wide}), ("coefficients", {**tile, "HAS_WEIGHTS": options})]
    return [a_case(card, dtype, kernel, own) for kernel, own in cases]


def a_case(card: Card, dtype: str, kernel: str, options: dict[str, Any]) -> dict[str, Any]:
    warps = options.pop("num_warps")
    return {"kernel": kernel, "sm": SM[card], "dtype": dtype, "num_warps": warps, "constants": options}


def check(card: Card, cases: list[dict[str, Any]], cache: Path, at_least: int = 1) -> list[dict[str, int]]:
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
    found: list[dict[str, int]] = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert len(found) == len(cases)
    for case, own in zip(cases, found, strict=True):
        assert at_least <= own["shared_bytes"] <= card.shared_bytes, case
    return found


def test_the_largest_head_dim_fits_a_consumer_card(tmp_path: Path) -> None:
    check(CONSUMER, cases_of(CONSUMER, torch.bfloat16, 256), tmp_path)


def test_a_padded_head_dim_with_every_option_compiles_for_hopper(tmp_path: Path) -> None:
    check(HOPPER, cases_of(HOPPER, torch.float16, 80, options=True), tmp_path)


def test_the_other_kernels_compile(tmp_path: Path) -> None:
    rows, epilogue = row_cases(CONSUMER, 4096), epilogue_cases(CONSUMER, 8192, "bf16", True)
    found = check(CONSUMER, [*rows, *epilogue], tmp_path, at_least=0)
    for case, own in zip(rows, found, strict=False):
        assert own["two_byte_accesses"] == 0, case


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_other_kernels_compile_for_every_card(card: Card, tmp_path: Path) -> None:
    cases = [case for width in (128, 576, 16384) for case in row_cases(card, width)]
    cases += [*row_cases(card, 2048, "fp32"), *row_cases(card, 19, "fp64")]
    cases += epilogue_cases(card, 1, "fp64", options=True)
    for n_documents, dtype in itertools.product((64, 32768), ("bf16", "fp16", "fp32")):
        cases += epilogue_cases(card, n_documents, dtype, options=n_documents == 64)
    check(card, cases, tmp_path, at_least=0)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_entry_fits_its_card(card: Card, tmp_path: Path) -> None:
    half, full = torch.bfloat16, torch.float32
    cases = [
        case
        for head_dim in (32, *HALF_TILES[card])
        for max_seqlen in ((512, SHORT_TEXT_TOKENS) if head_dim <= max(SHORT_HALF_TILES) else (512,))
        for case in cases_of(card, half, head_dim, max_seqlen)
    ]
    cases += [case for head_dim in (64, 96, 256) for case in cases_of(card, half, head_dim, options=True)]
    # One table for every card: the largest tiles count where there is least.
    widths = tuple(FLOAT_TILES) if card is CONSUMER else (64,)
    cases += [case for head_dim in widths for case in cases_of(card, full, head_dim)]
    check(card, cases, tmp_path)


def test_table_in_the_document_is_that_of_the_code() -> None:
    """`UPDATE_DOCS=1 pytest tests/kernels/test_compile.py` writes it."""

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
