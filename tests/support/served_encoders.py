"""Tiny exports of every type for servers of others, which know few widths of heads, and a table of theirs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm2vec_ds import Encoder, EncoderSettings
from llm2vec_ds.data.prompts import Template
from llm2vec_ds.export.export import ExportOptions, export
from tests.support import model_types
from tests.support.encoder_folders import cosines
from tests.support.gguf_encoders import trunk
from tests.support.tiny import sentences, tiny_tokenizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
INSTRUCTION = "Find what the question asks for:"
TEXTS = ["bread", *sentences(8, 1), " ".join(sentences(30, 3))[:1500]]
"""The last one is far longer than WINDOW."""
FIGURE = re.compile(r"\d+e[-+]\d+")
ROUNDING = 1e-5
"""Of fp32, in a tiny model with large weights; a wrong mask costs ten thousand times as much."""
WINDOW = 16
SIZES: dict[str, Any] = {
    **model_types.SIZES,
    "hidden_size": 128,
    "intermediate_size": 96,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 64}, 3: {"head_dim": 64}}},
    "deepseek_v3": {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32},
}


class Difference(NamedTuple):
    """Of vectors of length 1 from the encoder's: the largest of any number, and the lowest cosine."""

    largest: float
    cosine: float

    def __str__(self) -> str:
        return f"{self.largest:.0e}, 1 − {1 - self.cosine:.0e}"


def difference(found: np.ndarray, expected: np.ndarray) -> Difference:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(found), np.float64(expected)))
    return Difference(float(np.abs(a - b).max()), float(cosines(a, b).min()))


def tiny_encoder(kind: str, *, windows: bool = True, **settings: Any) -> Encoder:
    """Of a type of `model_types.TYPES`; with `windows` those of its layers that may have one have it."""
    changes = {**SIZES, **model_types.TYPES[kind], **CHANGES.get(kind, {})}
    if "sliding_window" in changes:
        none = 512 if "layer_types" in changes else None  # layers that are listed as windowed need one
        changes["sliding_window"] = WINDOW if windows else none
    if not windows and "use_sliding_window" in changes:
        changes["use_sliding_window"] = False
    chosen = {"pooled_tokens": "all", "prompts": {"query": INSTRUCTION}, **settings}
    return Encoder(trunk(kind, **changes), tiny_tokenizer(bos=True), EncoderSettings(**chosen))


def exported(encoder: Encoder, folder: Path) -> Path:
    """The folder that servers get."""
    encoder.save(folder / "encoder")
    export(folder / "encoder", folder / "out", ExportOptions())
    return folder / "out"


def asked(encoder: Encoder, text: str) -> str:
    """What has to be sent for a text with the instruction."""
    return Template(encoder.settings.template).render(INSTRUCTION, text)[0]


def lines_of(block: str) -> str:
    """The document's block whose fence says `block`."""
    found = re.search(rf"^```{block}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None, block
    return found[1]


def same_order(a: np.ndarray, b: np.ndarray, tie: float = 1e-5) -> bool:
    """Of two lists of scores; what differs by less than `tie` has no order."""
    return bool((np.diff(b[np.argsort(a)]) > -tie).all())


def write_or_check_rows(head: str, first: str, rows: list[str]) -> list[str]:
    """The rows below `head` that begin with `first`, which UPDATE_DOCS makes those given.

    Returns them as the document has them: figures differ from machine to machine.
    """
    before, found, after = DOCUMENT.read_text(encoding="utf-8").partition(head)
    assert found, head
    written = re.match(r"(?:\|.+\n)*", after)
    assert written is not None
    lines = written.group().splitlines()
    if os.environ.get("UPDATE_DOCS"):
        place = next((i for i, line in enumerate(lines) if line.startswith(first)), len(lines))
        others = [line for line in lines if not line.startswith(first)]
        lines = [*others[:place], *rows, *others[place:]]
        table = "".join(f"{line}\n" for line in lines)
        DOCUMENT.write_text(before + head + table + after[written.end() :], encoding="utf-8")
    return [line for line in lines if line.startswith(first)]


def check_rows(head: str, first: str, rows: list[str]) -> None:
    """As `write_or_check_rows`; then a row's words are the same, and its differences at most four times as
    large as written: another processor rounds otherwise."""
    written = write_or_check_rows(head, first, rows)
    assert [FIGURE.sub("#", row) for row in written] == [FIGURE.sub("#", row) for row in rows]
    for said, row in zip(written, rows, strict=True):
        for before, now in zip(FIGURE.findall(said), FIGURE.findall(row), strict=True):
            assert float(now) <= max(4 * float(before), ROUNDING), (said, row)


POOLINGS = ("mean", "last", "eos", "bos")
SERVED: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"pooling": pooling}) for kind in ("llama", "qwen3", "gemma3_text") for pooling in POOLINGS),
    ("llama", {"pooling": "weighted_mean"}),
    ("llama", {"pooling": "mean", "pooled_tokens": "text"}),
]
"""What every server is tried with: a type, and an encoder's settings."""
TABLE = (
    "| consumer | model type | pooling | without instruction | with instruction |\n|---|---|---|---|---|\n"
)


def pooling_row(
    consumer: str, kind: str, encoder: Encoder, vectors: np.ndarray, largest: float = ROUNDING
) -> str:
    """Of TABLE: how near the vectors `[2 N, D]` of TEXTS are, without and with the instruction.

    Those that differ by more than `largest` get no figure: they are other vectors.
    """
    cells = []
    for found, instruction in zip(np.split(vectors, 2), (None, INSTRUCTION), strict=True):
        gap = difference(found, encoder.encode(TEXTS, instruction=instruction))
        cells.append(str(gap) if gap.largest < largest else "other vectors")
    return named_row(consumer, kind, encoder, *cells)


def named_row(consumer: str, kind: str, encoder: Encoder, *cells: str) -> str:
    """Of TABLE."""
    tokens = "" if encoder.settings.pooled_tokens == "all" else ", the text's own tokens"
    return f"| {consumer} | `{kind}` | `{encoder.settings.pooling}`{tokens} | {' | '.join(cells)} |"
