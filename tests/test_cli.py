"""The command line: help that teaches, and mistakes that cost one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds.__main__ import main
from llm2vec_ds.encoder import Encoder
from tests.support.runs import command, recipe, write_recipe
from tests.support.tiny import sentences


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["llm2vec-ds", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("name", ["train", "encode", "demo"])
def test_help_shows_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"llm2vec-ds {name}" in shown
    assert "Example" in shown


def test_encode_writes_the_vectors_of_the_encoder(tmp_path: Path, tiny_model_dir: Path) -> None:
    texts = sentences(9)
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    files = ["--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out" / "v.npy")]
    outcome = command(["encode", "--model", str(tiny_model_dir), *files, "--instruction", "bread"])
    assert outcome.returncode == 0, outcome.stderr
    expected = Encoder.from_pretrained(tiny_model_dir).encode(texts, instruction="bread")
    np.testing.assert_allclose(np.load(tmp_path / "out" / "v.npy"), expected, atol=1e-5)


def test_launchers_put_local_rank_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--local_rank=0", "train", "none.yaml") == 2
    assert "none.yaml not found" in capsys.readouterr().err


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("llm2vec-ds: error:")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": "no/such/model"}}, "model 'no/such/model' cannot be loaded"),
        ({"data": {"path": "none.txt", "max_tokens": 64}}, "data file none.txt not found"),
        ({"deepspeed": "none.json"}, "DeepSpeed config none.json not found"),
        ({"batch": {"global_batch_size": 1000}}, "do not fill one batch of 1000"),
        ({"batch": {"global_batch_size": 8, "max_tokens_per_micro_batch": 100}}, "raise it to at least 128"),
        ({"simcse": {"attention_dropuot": 0.1}}, "did you mean `simcse.attention_dropout`?"),
        ({"adapter": {"target_modules": ["nothing"]}}, "linear layers here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_in_a_recipe(
    changes: dict[str, object],
    message: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run")
    values.update(changes)
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    assert message in one_line(capsys)


def test_a_run_is_not_overwritten_unasked(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious\n")
    path = write_recipe(recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run"), tmp_path / "r.yaml")
    assert run(monkeypatch, "train", path) == 2
    assert "already holds a run" in one_line(capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        (None, "v.npy", "No such file"),
        (b"", "v.npy", "is empty"),
        (b"\xff\xfe\x00", "v.npy", "not UTF-8"),
        (b"one\n\ntwo\n", "v.npy", "text 1 (counted from 0) is empty"),
        (b"one\n", "v.txt", "must end in .npy"),
    ],
    ids=["missing", "empty", "binary", "blank line", "wrong suffix"],
)
def test_mistakes_in_encode(
    content: bytes | None,
    output: str,
    message: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "texts.txt"
    if content is not None:
        texts.write_bytes(content)
    arguments = ["--model", tiny_model_dir, "--input", texts, "--output", tmp_path / output]
    assert run(monkeypatch, "encode", *arguments) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / output).exists()
