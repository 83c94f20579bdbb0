"""Finds the encoded texts that are nearest to a query, by exact search, block by block."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_ds.data.sources import find_source
from llm2vec_ds.data.text_rows import TextRows
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.fingerprint import encoder_fingerprint
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.fingerprint import json_sha256
from llm2vec_ds.vectors.encode import STDIN
from llm2vec_ds.vectors.files import (
    ROWS_PER_BLOCK,
    VectorNote,
    note_of,
    read_rows,
    stored_rows,
    vector_blocks,
    vector_files,
)
from llm2vec_ds.vectors.quantized import dequantize, hamming, quantize

log = logging.getLogger(__name__)

RESCORED = 16
"""For binary vectors, the RESCORED · `top` rows with the nearest signs are compared with the query itself."""


@dataclass(frozen=True)
class Hit:
    """A found text: its row in the encoded input, the cosine with the query, and the text itself."""

    row: int
    cosine: float
    text: str


def search(
    index: str | Path,
    query: str,
    *,
    top: int = 10,
    model: str | None = None,
    texts: str | None = None,
    instruction: str | None = None,
    prompt_name: str | None = None,
) -> list[Hit]:
    """Returns the `top` nearest texts, nearest first. Rows without a vector are never among them.

    Args:
        index: what `llm2vec-ds encode` wrote: a file, or a folder of shards.
        model: the encoder. None: the one that the index names.
        texts: the file of the texts. None: the input that the index names.
        instruction: goes before the query.
        prompt_name: name of an instruction that the encoder stores. Give this or `instruction`, not both.

    Raises:
        UserError: index, model or texts do not exist, or do not belong together.
    """
    files = vector_files(index)
    note = VectorNote.read(files[0])
    if note is None:
        raise UserError(f"{files[0]} has no note {note_of(files[0]).name}: encode it again")
    if model is None and Path(note.model).is_absolute() and not Path(note.model).exists():
        raise UserError(f"{index} was made by {note.model}, which is gone: give its encoder with --model")
    _check_model(index, note, model)
    encoder = Encoder.from_pretrained(model or note.model)
    if encoder.dimensions < note.dimensions:
        raise UserError(
            f"{index} has {note.dimensions} dimensions, but the model has {encoder.dimensions}: use the "
            "model that made it"
        )
    vector = encoder.encode(
        query,
        instruction=instruction,
        prompt_name=prompt_name,
        truncate_dim=note.dimensions,
        normalize=True,
    )
    rows, cosines = (_nearest_by_signs if note.stored == "binary" else _nearest)(index, vector, top)
    found = _texts(files, note, texts, {note.first_row + int(row) for row in rows})
    return [
        Hit(note.first_row + int(row), float(cosine), found[note.first_row + int(row)] or "")
        for row, cosine in zip(rows, cosines, strict=True)
    ]


def _check_model(index: str | Path, note: VectorNote, given: str | None) -> None:
    """Refuses the index's own model if it has changed. Warns if another one was given."""
    found = encoder_fingerprint(given or note.model)
    if note.model_key is None or found in (None, note.model_key):
        return
    if given is None:
        raise UserError(
            f"{note.model} has changed since it made {index}: encode the texts again, or give the encoder "
            "that made it with --model"
        )
    log.warning("%s is not the encoder that made %s: cosines may mean nothing", given, index)


def _nearest(index: str | Path, vector_D: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and cosines, best first."""
    rows, cosines, start = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), 0
    for block_ND in vector_blocks(index):
        lengths = np.linalg.norm(block_ND, axis=1).clip(min=1e-12)
        scores = np.nan_to_num(block_ND @ vector_D / lengths, nan=-np.inf)
        rows = np.concatenate([rows, np.arange(start, start + len(block_ND))])
        cosines = np.concatenate([cosines, scores])
        best = np.argsort(-cosines, kind="stable")[:top]
        rows, cosines = rows[best], cosines[best]
        start += len(block_ND)
    good = np.isfinite(cosines)
    return rows[good], cosines[good]


def _nearest_by_signs(index: str | Path, vector_D: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and cosines, best first, for binary vectors.

    A short list comes from the Hamming distance. Its order comes from the cosines between the query's own
    vector and the signs (cf. Yamada et al., 2021, arXiv 2106.00882).
    """
    bits = quantize(vector_D[None], "binary")[0]
    rows, distances = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    signs = np.empty((0, len(bits)), dtype=np.uint8)
    start = 0
    for file in vector_files(index):
        mapped, _, _ = stored_rows(file)
        for begin in range(0, len(mapped), ROWS_PER_BLOCK):
            block = np.asarray(mapped[begin : begin + ROWS_PER_BLOCK])
            rows = np.concatenate([rows, np.arange(start, start + len(block))])
            distances = np.concatenate([distances, hamming(block, bits)])
            signs = np.concatenate([signs, block])
            best = np.argsort(distances, kind="stable")[: RESCORED * top]
            rows, distances, signs = rows[best], distances[best], signs[best]
            start += len(block)
    cosines = dequantize(signs, "binary", len(vector_D)) @ vector_D / np.sqrt(len(vector_D))
    best = np.argsort(-cosines, kind="stable")[:top]
    return rows[best], cosines[best]


def _texts(files: list[Path], note: VectorNote, given: str | None, wanted: set[int]) -> dict[int, str | None]:
    """Returns the texts of the wanted rows, from the index if it holds them, else from its input."""
    if not wanted:
        return {}
    if given is None and files[0].suffix != ".npy":
        rows = (row for file in files for block in read_rows(file) for row in block)
        return {row["row"]: row["text"] for row in rows if row["row"] in wanted}
    if given is None and note.input == STDIN:
        raise UserError(f"{files[0]} was made from standard input: give the file of its texts with --texts")
    source = find_source(given or note.input, "--texts")
    changed = note.input_key not in (None, json_sha256(source.identity()))
    if given is None and changed:
        raise UserError(
            f"{note.input} has changed since it was encoded, so its rows may be other texts now: encode it "
            "again, or give the texts that were encoded with --texts"
        )
    texts = TextRows(source, note.text_column, 0, max(wanted) + 1, bad_rows="skip")
    found = {row: text for row, text in enumerate(texts) if row in wanted}
    if missing := [row for row in sorted(wanted) if not found.get(row)]:
        raise UserError(
            f"{source} has no text in row {missing[0]}, so these are not the texts that were encoded: give "
            "those with --texts"
        )
    return found
