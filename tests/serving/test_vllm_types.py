"""Which exports vLLM serves with the encoder's vectors: docs/serving.md says it, type by type.

`UPDATE_DOCS=1 pytest tests/serving -m slow` writes the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from llm2vec_ds import Encoder
from llm2vec_ds.export.vllm import READ_BY_TRANSFORMERS, READS_IS_CAUSAL, Start, start_of
from tests.support.model_types import TYPES
from tests.support.served_encoders import (
    POOLINGS,
    ROUNDING,
    SERVED,
    TABLE,
    TEXTS,
    WINDOW,
    asked,
    check_rows,
    difference,
    exported,
    pooling_row,
    tiny_encoder,
)
from tests.support.serving_environment import version
from tests.support.vllm_jobs import done, job

pytestmark = pytest.mark.slow

HEAD = "| model type | vLLM, as exported | started with | then |\n|---|---|---|---|\n"


class Case(NamedTuple):
    """A row: a type, with windows in the layers that may have them or without."""

    kind: str
    windows: bool

    @property
    def name(self) -> str:
        if "sliding_window" not in TYPES[self.kind]:
            return f"`{self.kind}`"
        return f"`{self.kind}`, " + (f"windows of {WINDOW}" if self.windows else "no window that cuts")


def cases() -> list[Case]:
    found = []
    for kind, settings in TYPES.items():
        if kind in READS_IS_CAUSAL | READ_BY_TRANSFORMERS and "sliding_window" in settings:
            found.append(Case(kind, False))
        found.append(Case(kind, True))
    return found


def causal_vectors(encoder: Encoder) -> np.ndarray:
    encoder.trunk.config.is_causal = True
    return encoder.encode(TEXTS)


def words(found: np.ndarray | str, expected: np.ndarray, causal: np.ndarray) -> str:
    if isinstance(found, str):
        return "refused"
    if difference(found, expected).largest < ROUNDING:
        return str(difference(found, expected))
    return "causal" if difference(found, causal).largest < ROUNDING else "other vectors"


def test_types_are_served_as_the_export_says(vllm: Path, tmp_path: Path) -> None:
    """Also that no other type is: where vLLM learns one, this fails, and the export may say so."""
    jobs, starts, expected, causal = [], [], [], []
    for i, case in enumerate(cases()):
        encoder = tiny_encoder(case.kind, windows=case.windows)
        folder = exported(encoder, tmp_path / str(i))
        start = start_of(encoder.trunk.config, encoder.settings.max_tokens)
        starts.append(start)
        expected.append(encoder.encode(TEXTS))
        causal.append(causal_vectors(encoder))
        jobs += [job(folder), job(folder, **start.options)] if start.options else [job(folder)]
    answers = iter(done(vllm, jobs, tmp_path))
    rows = []
    for case, start, right, past in zip(cases(), starts, expected, causal, strict=True):
        plain = words(next(answers), right, past)
        then = words(next(answers), right, past) if start.options else ""
        rows.append(f"| {case.name} | {plain} | {options_said(start)} | {then} |")
        served = "1 −" in (then or plain)
        assert served == (start.refusal is None), rows[-1]
        assert "1 −" not in plain or not start.options, f"{rows[-1]}: needless options"
    check_rows(HEAD, "|", rows)


def options_said(start: Start) -> str:
    return f"`{start.line.strip()}`" if start.options else ""


def test_poolings_and_instructions(vllm: Path, tmp_path: Path) -> None:
    jobs, encoders = [], []
    for i, (kind, settings) in enumerate(SERVED):
        encoder = tiny_encoder(kind, windows=kind == "gemma3_text", **settings)
        folder = exported(encoder, tmp_path / str(i))
        encoders.append(encoder)
        jobs.append(job(folder, [*TEXTS, *(asked(encoder, text) for text in TEXTS)]))
    answers = done(vllm, jobs, tmp_path)
    name = f"vLLM {version('vllm')}"
    rows = [
        pooling_row(name, kind, encoder, np.asarray(vectors))
        for (kind, _), encoder, vectors in zip(SERVED, encoders, answers, strict=True)
    ]
    for row, (_, settings) in zip(rows, SERVED, strict=True):
        exact = settings["pooling"] in POOLINGS and settings.get("pooled_tokens") != "text"
        assert row.count("1 −") == 2 * exact, row
    check_rows(TABLE, f"| {name} |", rows)
