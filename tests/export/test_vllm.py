"""What an export says of vLLM; that it is true is for `tests/serving` to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llm2vec_ds.export.export import ExportOptions, export
from llm2vec_ds.export.vllm import start_of, vllm_notes
from llm2vec_ds.model.bidirectional import with_causal
from tests.support.served_encoders import tiny_encoder

MIXED = {"use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4, "sliding_window": 16}
ALL = {**MIXED, "max_window_layers": 0}
STARTS: list[tuple[str, dict[str, Any], int, str]] = [
    ("llama", {}, 512, ""),
    ("mistral", {"sliding_window": None}, 512, ""),
    ("mistral", {"sliding_window": 16}, 16, ""),
    ("mistral", {"sliding_window": 16}, 17, """ --hf-overrides '{"sliding_window": 17}'"""),
    ("qwen3", ALL, 512, """ --hf-overrides '{"sliding_window": 17}'"""),
    ("gemma", {}, 512, " --model-impl transformers"),
    (
        "gemma2",
        {"sliding_window": 16},
        512,
        """ --model-impl transformers --hf-overrides '{"sliding_window": 17}'""",
    ),
    ("gemma3_text", {"sliding_window": 16}, 512, ""),
]


@pytest.mark.parametrize(("kind", "values", "max_tokens", "line"), STARTS)
def test_options_widen_a_window_that_cuts(
    kind: str, values: dict[str, Any], max_tokens: int, line: str
) -> None:
    config = with_causal(AutoConfig.for_model(kind, **values), False)
    start = start_of(config, max_tokens)
    assert (start.line, start.refusal) == (line, None)
    said = vllm_notes(config, max_tokens)
    assert said == (
        [f"Start vLLM with these options: vllm serve FOLDER --runner pooling{line}"] if line else []
    )


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("olmo2", {}, "vLLM is not known to run model type 'olmo2' with bidirectional attention"),
        ("qwen2", MIXED, "vLLM does not load 'qwen2' with a sliding window in only some of its layers"),
    ],
)
def test_what_vllm_cannot_serve_is_said(kind: str, values: dict[str, Any], said: str) -> None:
    config = AutoConfig.for_model(kind, **values)
    (note,) = vllm_notes(with_causal(config, False), 512)
    assert note == f"{said}: serve with sentence-transformers, which gives the encoder's vectors."
    assert vllm_notes(with_causal(config, True), 512) == []


def test_the_card_has_no_line_for_vllm_where_it_gives_other_vectors(tmp_path: Path) -> None:
    tiny_encoder("olmo2").save(tmp_path / "encoder")
    notes = export(tmp_path / "encoder", tmp_path / "out", ExportOptions())
    card = (tmp_path / "out" / "README.md").read_text()
    assert any("model type 'olmo2' with bidirectional" in note and note in card for note in notes)
    assert "vllm serve" not in card
    assert "text-embeddings-router" in card


@pytest.mark.parametrize("dims", [None, [8, 16]])
def test_trained_lengths_of_vectors_are_written(dims: list[int] | None, tmp_path: Path) -> None:
    tiny_encoder("llama").save(tmp_path / "run" / "encoder")
    recipe = {"stage": "simcse", "model": {"path": "base"}, "data": {"path": "x.txt"}, "max_steps": 1}
    recipe |= {"batch": {"global_batch_size": 4}, "simcse": {"matryoshka_dims": dims}, "output_dir": "simcse"}
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    export(tmp_path / "run", tmp_path / "out", ExportOptions())
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("matryoshka_dimensions") == dims
