"""What a user of `export` gets wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.mistakes import Mistake

MISTAKES = {
    "nothing to export": Mistake(
        "TMP/none holds no encoder: give a run's folder, a demo's, or an encoder folder",
        ("export", "TMP/none", "--output", "TMP/out"),
    ),
    "prompt without a name": Mistake(
        "--prompt 'query' is not NAME=TEXT, such as query=Find passages that answer",
        ("export", "TMP/none", "--output", "TMP/out", "--prompt", "query"),
    ),
    "a GGUF under the name of a folder": Mistake(
        "--output TMP/out: a GGUF is one file: name it out.gguf",
        ("export", "TMP/encoder", "--output", "TMP/out", "--format", "gguf"),
    ),
    "a repository without an owner": Mistake(
        "--push needs a repository on the hub: give OWNER/NAME, such as my-team/my-encoder",
        ("export", "TMP/none", "--output", "TMP/out", "--push", "name"),
    ),
    "scores that are not there": Mistake(
        "--scores TMP/scores.json not found: give the scores.json of llm2vec-ds evaluate mteb",
        ("export", "TMP/encoder", "--output", "TMP/out", "--scores", "TMP/scores.json"),
    ),
    "a dry run of nothing": Mistake(
        "--dry-run shows what --push would upload: add --push OWNER/NAME",
        ("export", "TMP/none", "--output", "TMP/out", "--dry-run"),
    ),
    "a dtype that a graph has not": Mistake(
        "--dtype 'q8_0' is not supported by --format onnx: choose auto, fp32, fp16, int8",
        ("export", "TMP/encoder", "--output", "TMP/out", "--format", "onnx", "--dtype", "q8_0"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name: str, costs_one_line: Callable[[Mistake], None]) -> None:
    costs_one_line(MISTAKES[name])
