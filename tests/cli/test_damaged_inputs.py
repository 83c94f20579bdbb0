"""Damaged data and commands that meet them, and places that cannot be written: one line, and nothing lost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llm2vec_ds import UserError
from llm2vec_ds.data import prepare as prepare_module
from llm2vec_ds.data.prepare import load_prepared, prepare
from llm2vec_ds.data.prepared_folder import read_manifest
from llm2vec_ds.demo.model import demo_model_dir
from llm2vec_ds.evaluate.sts import load_graded_pairs
from llm2vec_ds.recipe.sections import DataConfig
from tests.support.damage import DEEP, JSON_DAMAGE, RANDOM, Damage, damage, save_nan_llama
from tests.support.evaluation_files import pairs_file
from tests.support.in_process import assert_reads, error_line, run
from tests.support.runs import recipe, write_recipe
from tests.support.tiny import save_tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> bytes:
    """As an Arrow file holds them."""
    return np.array(TOKENIZER(text)["input_ids"][1:], dtype=np.int32).tobytes()


PREPARED_DAMAGE: dict[str, Damage] = {
    "cut off": lambda content: content[: len(content) // 2],
    "random bytes": lambda content: RANDOM,
    "an id beyond the vocabulary": lambda content: content.replace(ids(" the"), b"\x0f\x27\0\0"),
}


def prepared(texts: Path, root: Path) -> Path:
    return prepare(DataConfig(path=str(texts), prepared_dir=str(root)), str(texts), TOKENIZER)


@pytest.mark.parametrize("how", [*PREPARED_DAMAGE, "missing"])
def test_damaged_prepared_texts_are_made_anew(
    how: str, texts_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepared(texts_file, tmp_path)
    (part,) = folder.glob("*.arrow")
    whole = part.read_bytes()
    if how == "missing":
        part.unlink()
    else:
        damage(part, PREPARED_DAMAGE[how])
        assert part.read_bytes() != whole
    assert prepared(texts_file, tmp_path) == folder
    assert part.read_bytes() == whole
    assert f"prepared texts in {folder} are damaged (" in caplog.text


@pytest.mark.parametrize("how", JSON_DAMAGE)
def test_a_damaged_manifest_is_made_anew(
    how: str, texts_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = prepared(texts_file, tmp_path) / "manifest.json"
    whole = manifest.read_text()
    damage(manifest, JSON_DAMAGE[how])
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(.+\): remove .+, then prepare again"):
        read_manifest(manifest.parent)
    prepared(texts_file, tmp_path)
    assert manifest.read_text() == whole
    assert "preparing them again" in caplog.text


def test_prepared_texts_that_get_damaged_before_they_are_opened(texts_file: Path, tmp_path: Path) -> None:
    """As a rank of another node may find them."""
    folder = prepared(texts_file, tmp_path)
    damage(next(folder.glob("*.arrow")), PREPARED_DAMAGE["random bytes"])
    with pytest.raises(UserError, match=r"are damaged \(.+\): prepare them again"):
        load_prepared(folder)


@pytest.mark.parametrize("how", ["note", "part", "no part"])
def test_a_damaged_unfinished_preparation_is_not_gone_on_with(
    how: str,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = load_prepared(prepared(texts_file, tmp_path / "whole")).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module._Preparation, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(texts_file, tmp_path / "other")
    (unfinished,) = (tmp_path / "other").glob(".*.unfinished")
    part = unfinished / "part-00000.arrow"
    if how == "note":
        damage(unfinished / "progress.json", JSON_DAMAGE["cut off"])
    elif how == "part":
        damage(part, PREPARED_DAMAGE["cut off"])
    else:
        part.unlink()
    assert load_prepared(prepared(texts_file, tmp_path / "other")).fingerprint == whole
    assert "preparing from the first text" in caplog.text


@pytest.mark.parametrize("stage", ["simcse", "mntp"])
def test_training_refuses_the_tokenizer_of_another_model(
    stage: str,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_tiny_llama(tmp_path / "model", vocab_size=200)
    path = write_recipe(recipe(stage, model, texts_file, tmp_path / "run"), tmp_path / "r.yaml")
    assert run(monkeypatch, "train", path) == 2
    line = (
        "the tokenizer has … tokens, the model has embeddings for 200: … use the tokenizer that belongs to …"
    )
    assert_reads(error_line(capsys), line)


def test_a_score_that_is_nan_has_no_rank(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("a,b,1\nc,d,2\ne,f,nan\n")
    with pytest.raises(UserError, match="line 3: the score 'nan' is no number: write it as 3.5"):
        load_graded_pairs(tmp_path / "p.csv")


DEEP_YAML = b"[" * 5000 + b"]" * 5000
COMMANDS: dict[str, tuple[str, list[str], bytes]] = {
    "jsonl": ("a.jsonl, line 1: not valid JSON: it is nested too deeply", ["prepare", "R"], DEEP),
    "a recipe": ("recipe a.yaml is not valid YAML: it is nested too deeply", ["train", "F"], DEEP_YAML),
    "an ablation": ("recipe a.yaml is not valid YAML: it is nested too deeply", ["ablate", "F"], DEEP_YAML),
    "DeepSpeed": ("DeepSpeed config a.json must be a JSON object: …", ["train", "R", "deepspeed=F"], DEEP),
    "a section": (
        "DeepSpeed config a.json: `zero_optimization` must be an object, not 3",
        ["train", "R", "deepspeed=F"],
        b'{"zero_optimization": 3}',
    ),
    "random jsonl": ("a.jsonl, line 1: not valid JSON: …", ["prepare", "R"], RANDOM),
    "random text": ("a.txt: no text in it (…)", ["prepare", "R"], RANDOM),
    "random csv": (
        "a.csv is not text in UTF-8 (…): convert it, such as by iconv -f latin1 -t utf8 FILE > NEW",
        ["prepare", "R"],
        RANDOM,
    ),
    "random pairs": ("a.jsonl, line 1: not valid JSON: …", ["mine", "--pairs", "F"], RANDOM),
    "random corpus": ("a.parquet is not a Parquet file: …", ["encode", "--input", "F"], RANDOM),
    "bytes as text": (
        "a.txt, row 1 is no text in UTF-8: convert the file, …",
        ["encode", "--input", "F"],
        b"\xff\x00\n\xfe\x00\n",
    ),
}
SUFFIX = {"a recipe": ".yaml", "an ablation": ".yaml", "DeepSpeed": ".json", "a section": ".json"}
SUFFIX |= {"random text": ".txt", "random csv": ".csv", "random corpus": ".parquet", "bytes as text": ".txt"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_file_costs_one_line(
    name: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line, arguments, content = COMMANDS[name]
    file = tmp_path / f"a{SUFFIX.get(name, '.jsonl')}"
    file.write_bytes(content)
    texts = file if file.suffix in (".jsonl", ".txt", ".csv") else tmp_path / "none.txt"
    path = write_recipe(recipe("simcse", tiny_model_dir, texts, tmp_path / "run"), tmp_path / "r.yaml")
    words = {"R": str(path), "F": str(file), "deepspeed=F": f"deepspeed={file}"}
    filled = [words.get(argument, argument) for argument in arguments]
    if arguments[0] in ("mine", "encode"):
        output = tmp_path / ("m.jsonl" if arguments[0] == "mine" else "v.npy")
        filled += ["--model", str(tiny_model_dir), "--output", str(output)]
    assert run(monkeypatch, *filled) == 2
    assert_reads(error_line(capsys), line.replace(file.name, str(file), 1))
    assert not list(tmp_path.glob("[vm].*"))


def test_nan_weights_end_encode_and_mine(
    tmp_path: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_nan_llama(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"query": "fish", "positive": "trout"}\n')
    line = "text … (counted from 0) gets no finite vector: the model's weight layers.1… is not …"
    for command, source, output in (
        ("encode", texts_file, "v.npy"),
        ("mine", tmp_path / "p.jsonl", "m.jsonl"),
    ):
        option = "--input" if command == "encode" else "--pairs"
        arguments = ["--model", model, option, source, "--output", tmp_path / output]
        assert run(monkeypatch, command, *arguments) == 2
        assert_reads(error_line(capsys), line)
        assert not (tmp_path / output).exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["prepare", "RECIPE"],
            "prepared texts in FILE/c/prepared cannot be written: Not a directory: choose …",
        ),
        (
            ["demo", "--print-model-dir"],
            "the demo's model FILE/c/models/… cannot be written: Not a directory: …",
        ),
        (["report", "RUN", "--output", "FILE/r.html"], "--output FILE/r.html cannot be written: …: choose …"),
        (["ablate", "ABLATION", "--output", "FILE/a"], "--output FILE/a cannot be written: …: choose …"),
        (
            ["demo", "--output", "FILE/d", "--model", "MODEL"],
            "--output FILE/d cannot be written: …: choose …",
        ),
        (
            ["mine", "--pairs", "PAIRS", "--output", "FILE/m.jsonl"],
            "--output FILE/m.jsonl cannot be written: …",
        ),
        (
            ["encode", "--input", "TEXTS", "--output", "FILE/v"],
            "--output FILE/v/… cannot be written: …: choose …",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_file_in_place_of_a_folder(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a read-only disk, for outputs and for the cache."""
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "p.jsonl").write_text('{"query": "fish", "positive": "trout"}\n')
    task = f"sts:{pairs_file(tmp_path)}"
    (tmp_path / "a.yaml").write_text(
        f"model: {tiny_model_dir}\nvariants: [bi]\nevaluate: {{sentences: ['{task}']}}\n"
    )
    path = write_recipe(recipe("simcse", tiny_model_dir, texts_file, tmp_path / "r"), tmp_path / "r.yaml")
    monkeypatch.setenv("LLM2VEC_DS_CACHE", str(file / "c"))
    words = {
        "RECIPE": path,
        "RUN": tmp_path / "run",
        "ABLATION": tmp_path / "a.yaml",
        "MODEL": tiny_model_dir,
    }
    words |= {"PAIRS": tmp_path / "p.jsonl", "TEXTS": texts_file, "FILE": file}

    def filled(text: str) -> str:
        return re.sub("|".join(words), lambda found: str(words[found.group()]), text)

    model = ["--model", str(tiny_model_dir)] if arguments[0] in ("mine", "encode") else []
    assert run(monkeypatch, *map(filled, arguments), *model) == 2
    assert_reads(error_line(capsys), filled(line))
    assert file.read_bytes() == b"precious"


def test_a_refusal_that_nothing_else_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read-only disk below whatever a library writes."""

    def refuse() -> Path:
        raise OSError(30, "Read-only file system", "/cache/file")

    monkeypatch.setattr("llm2vec_ds.demo.model.demo_model_dir", refuse)
    assert run(monkeypatch, "demo", "--print-model-dir") == 2
    assert_reads(
        error_line(capsys), "/cache/file: Read-only file system: choose a path that you can write to"
    )


def test_the_demo_model_is_not_fetched_for_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LLM2VEC_DS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("llm2vec_ds.demo.model._fetch_gguf", lambda *_: pytest.fail("fetched"))
    with pytest.raises(UserError, match="the demo's model .+ cannot be written: Not a directory"):
        demo_model_dir()
