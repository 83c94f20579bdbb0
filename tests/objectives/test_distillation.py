"""Distillation: the teacher's vectors are made once, and an encoder learns them; mistakes cost one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm2vec_ds.data.prompts import Prompt, tokenize
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.settings import EncoderSettings
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives import teacher_vectors
from llm2vec_ds.objectives.distillation.teacher import prepare_teacher, teacher_folder
from llm2vec_ds.objectives.teacher_vectors import TeacherVectors
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.in_process import assert_reads, error_line, run
from tests.support.runs import NO_DROPOUT, write_recipe
from tests.support.teachers import save_teacher
from tests.support.tiny import sentences

LOAD = teacher_vectors.load_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def values(tiny_model_dir: Path, texts_file: Path, tmp_path: Path, teacher: Path) -> dict[str, Any]:
    return {
        "stage": "distil",
        "model": {"path": str(tiny_model_dir)},
        "data": {"path": str(texts_file), "max_tokens": 64, "held_out_path": str(texts_file)},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "batch": {"global_batch_size": 16, "micro_batch_tokens": 160},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every_steps": 3},
        "distil": {"teacher": str(teacher), "temperature": 0.2, "vector_weight": 1.0},
    }


def vectors_of(values: dict[str, Any]) -> TeacherVectors:
    recipe = parse_recipe(values)
    return TeacherVectors(prepare_teacher(recipe, recipe.data.path))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def counted(monkeypatch: pytest.MonkeyPatch, fails_at: int = 10**9) -> list[int]:
    """How many texts each call of the teacher gets; the call number `fails_at` fails."""
    calls: list[int] = []

    def counting(*arguments: Any) -> Callable[[list[str]], np.ndarray]:
        encode = LOAD(*arguments)

        def one(texts: list[str]) -> np.ndarray:
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            calls.append(len(texts))
            return encode(texts)

        return one

    monkeypatch.setattr(teacher_vectors, "load_teacher", counting)
    monkeypatch.setattr(teacher_vectors, "TEXTS_PER_BLOCK", 20)
    return calls


def test_vectors_are_the_teachers_and_found_by_text(
    values: dict[str, Any], texts_file: Path, teacher: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    values["data"]["instruction"] = "Read this:"
    values["distil"]["teacher_prompt"] = "the "
    texts = texts_file.read_text().splitlines()[::-7]
    hashes = np.array([Prompt("Read this:", text).hash() for text in texts])
    found = vectors_of(values)
    assert found.width == 24
    expected = SentenceTransformer(str(teacher), device="cpu").encode([f"the {text}" for text in texts])
    np.testing.assert_allclose(found[hashes].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not found.known(np.array([Prompt(None, texts[0]).hash()])).any()


def test_made_once_and_gone_on_with(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, fails_at=2)
    with pytest.raises(KeyboardInterrupt):
        vectors_of(values)
    assert calls == [20, 20]
    calls = counted(monkeypatch)
    whole = vectors_of(values)
    assert calls == [20, 4]
    assert vectors_of(values).fingerprint == whole.fingerprint
    assert calls == [20, 4]
    recipe = parse_recipe(values)
    folder = teacher_folder(recipe, recipe.data.path)
    content = (folder / "vectors.npy").read_bytes()
    (folder / "vectors.npy").write_bytes(content[:-8] + bytes(8))
    assert vectors_of(values).fingerprint == whole.fingerprint
    assert calls == [20, 4, 20, 20, 20, 4]
    assert (folder / "vectors.npy").read_bytes() == content


def test_only_what_the_recipe_reads_is_encoded(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first `max_texts` texts, without rows that `bad_rows` leaves out. With more, a line says so."""
    calls = counted(monkeypatch)
    file = tmp_path / "texts.jsonl"
    rows = [json.dumps({"text": f"The boat number {i} sails."}) for i in range(150)]
    file.write_text("\n".join([rows[0], "{broken", *rows[1:]]))
    values["data"] = {"path": str(file), "bad_rows": "skip", "max_tokens": 64}
    caplog.set_level("INFO")
    prepare_teacher(recipe := parse_recipe(values), recipe.data.path)
    assert sum(calls) == 150
    assert "encodes 150 texts, and this run trains on 96 at most: data.max_texts" in caplog.text
    calls.clear()
    values["data"] |= {"max_texts": 100}
    train(parse_recipe(values))
    assert sum(calls) == 100
    assert "100 rows" in caplog.text


def test_an_encoder_of_this_toolkit_and_its_vectors_teach_the_same(
    values: dict[str, Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself, what `encode` wrote, and shards of it."""
    encoder = Encoder.from_pretrained(tiny_model_dir, settings={"pooling": "last"})
    encoder.save(tmp_path / "own")
    assert EncoderSettings.of({}).pooling == "mean"
    texts = values["data"]["path"]
    encode = ("encode", "--model", tmp_path / "own", "--input", texts, "--instruction", "Say:", "--output")
    assert run(monkeypatch, *encode, tmp_path / "v.npy") == 0
    for shard in ("0/3", "1/3", "2/3"):
        assert run(monkeypatch, *encode, tmp_path / "shards", "--shard", shard) == 0
    hashes = np.array([Prompt(None, text).hash() for text in Path(texts).read_text().splitlines()[:64:5]])
    of_model = {"teacher": str(tmp_path / "own"), "teacher_prompt": "Say:"}
    sources = [of_model, {"teacher": str(tmp_path / "v.npy")}, {"teacher": str(tmp_path / "shards")}]
    found = [vectors_of({**values, "distil": source})[hashes] for source in sources]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=0)


def test_a_layer_teaches_what_transformers_calls_its_hidden_state(
    values: dict[str, Any], tiny_model_dir: Path
) -> None:
    """The mean over a text's tokens, before the final norm, with bidirectional attention."""
    values["distil"] = {"teacher": str(tiny_model_dir), "teacher_layer": 1}
    texts = Path(values["data"]["path"]).read_text().splitlines()[:64:9]
    found = vectors_of(values)[np.array([Prompt(None, text).hash() for text in texts])]
    encoder = Encoder.from_pretrained(tiny_model_dir)
    for text, vector in zip(texts, found, strict=True):
        (tokens,) = tokenize(encoder.tokenizer, [Prompt(None, text)])
        ids = torch.tensor([tokens.input_ids])
        with torch.no_grad():
            states = encoder.trunk(ids, output_hidden_states=True, use_cache=False).hidden_states
        expected = states[1][0, tokens.pool_start : tokens.pool_end].double().mean(0)
        torch.testing.assert_close(vector.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_whitened_teacher(values: dict[str, Any]) -> None:
    """The training texts give the directions, also for held-out texts, whose loss is that of the formula."""
    held_out = Path(values["data"]["path"]).with_name("held_out.txt")
    held_out.write_text("\n".join(sentences(12, seed=5)) + "\n")
    values["data"]["held_out_path"] = str(held_out)
    values |= {"max_steps": 1, "optimizer": {"lr": 1e-9}}
    values["distil"] |= {"teacher_whitening": 0.5, "vector_weight": 0.0}
    folder = train(parse_recipe(values))
    raw = {
        key: vectors_of({**values, "data": {**values["data"], "path": str(path)}})
        for key, path in (("train", values["data"]["path"]), ("held_out", held_out))
    }
    trained = np.concatenate(list(raw["train"].blocks())).astype(np.float64)
    _, singular, directions = np.linalg.svd(trained - trained.mean(0), full_matrices=False)
    whiten = directions.T / (singular / len(trained) ** 0.5) ** 0.5
    texts = held_out.read_text().splitlines()
    hashes = np.array([Prompt(None, text).hash() for text in texts])
    teacher = (raw["held_out"][hashes].double().numpy() - trained.mean(0)) @ whiten
    student = Encoder.from_pretrained(folder / "encoder").encode(texts).astype(np.float64)
    expected = []
    for cosines in (teacher, student):
        unit = cosines / np.linalg.norm(cosines, axis=1, keepdims=True)
        scores = unit @ unit.T / values["distil"]["temperature"]
        np.fill_diagonal(scores, -np.inf)
        expected.append(torch.from_numpy(scores).log_softmax(1))
    target, found = (scores.masked_fill(torch.eye(len(texts), dtype=torch.bool), 0) for scores in expected)
    weights = expected[0].exp()
    loss = (weights * (target - found)).sum(1).mean()
    assert lines(folder / "held_out.jsonl")[-1]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_it_learns_and_goes_on(
    values: dict[str, Any], tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the teacher lies elsewhere meanwhile; another teacher is refused."""
    file = write_recipe({**values, "max_steps": 24}, tmp_path / "r.yaml")
    folder = tmp_path / "run"
    assert run(monkeypatch, "prepare", file) == 0
    assert run(monkeypatch, "train", file) == 0
    held_out = lines(folder / "held_out.jsonl")
    assert held_out[-1]["loss"] < 0.7 * held_out[0]["loss"]
    assert held_out[-1]["loss"] == pytest.approx(
        held_out[-1]["vector_loss"] + held_out[-1]["similarity_loss"], rel=1e-6
    )
    rows, weights = lines(folder / "metrics.jsonl"), load_file(folder / "encoder" / "model.safetensors")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["distil"]["vector_loss"] == "cosine"
    shutil.copytree(teacher, tmp_path / "moved")
    moved = f"distil.teacher={tmp_path / 'moved'}"
    assert run(monkeypatch, "train", file, "resume=true", moved) == 0  # finished already
    (folder / "finished").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    assert run(monkeypatch, "train", file, "resume=true", moved) == 0
    assert [row["loss"] for row in lines(folder / "metrics.jsonl")] == [row["loss"] for row in rows]
    for name, weight in load_file(folder / "encoder" / "model.safetensors").items():
        assert torch.equal(weight, weights[name])
    other = save_teacher(tmp_path / "other", width=16)
    changed = parse_recipe({**values, "max_steps": 24, "resume": True, "distil": {"teacher": str(other)}})
    with pytest.raises(UserError, match="the training data have changed"):
        train(changed)


def test_it_is_planned(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "plan", write_recipe(values, tmp_path / "r.yaml"), "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stage"] == "distil"
    assert plan["largest_global_batch"] >= 16


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": (
        {"distil": {"teacher": "TMP/none"}},
        "distil.teacher TMP/none: there is no such folder",
    ),
    "no sentence-transformers folder": (
        {"distil": {"teacher": "MODEL"}},
        "distil.teacher MODEL has no modules.json: name a sentence-transformers folder, an encoder of this "
        "toolkit, or vectors that llm2vec-ds encode wrote",
    ),
    "own code": (
        {"distil": {"teacher": "TMP/code"}},
        "model 'TMP/code' cannot be loaded: it needs its own code…",
    ),
    "texts unknown": (
        {"distil": {"teacher": "TMP/bare.npy"}},
        "distil.teacher TMP/bare.npy does not say which texts its vectors belong to: write .npy files with "
        "llm2vec-ds encode, from a file of texts",
    ),
    "other texts": (
        {"distil": {"teacher": "TMP/few.npy"}},
        "distil.teacher has no vector for 60 of the 64 texts of data.path (the first is text 4, counted from "
        "0): encode these texts with the teacher, or set distil.teacher to a model",
    ),
    "too deep": (
        {"distil": {"teacher": "MODEL", "teacher_layer": 9}},
        "distil.teacher_layer: layer 9 was asked for, and the model has 2",
    ),
    "a layer of vectors": (
        {"distil": {"teacher": "TMP/few.npy", "teacher_layer": 1}},
        "distil.teacher TMP/few.npy holds finished vectors, which are of no layer: remove "
        "distil.teacher_layer, or name the model",
    ),
    "changed texts": (
        {"distil": {"teacher": "TMP/changed.npy"}, "data": "TMP/few.txt"},
        "distil.teacher TMP/changed.npy: TMP/few.txt has changed since it was encoded: encode it again",
    ),
    "one held-out text": (
        {"distil": {"teacher": "TMP/few.npy"}, "data": "TMP/few.txt", "held_out": "TMP/one.txt"},
        "data.held_out_path has one text, and no other to compare it with: add some",
    ),
    "not finite": (
        {"distil": {"teacher": "TMP/nan.npy", "teacher_whitening": 0.5}, "data": "TMP/few.txt"},
        "distil.teacher holds a NaN or an infinity: encode its texts again",
    ),
    "a narrow student": (
        {
            "distil": {"teacher": "TMP/few.npy", "projection": "none", "vector_weight": 1},
            "data": "TMP/few.txt",
        },
        "distil.projection: none cannot compare 32 components with the teacher's 40: use linear",
    ),
    "nothing to learn": (
        {"distil": {"teacher": "t", "vector_weight": 0, "similarity_weight": 0}},
        "TMP/r.yaml: distil.vector_weight and distil.similarity_weight are both 0: raise one",
    ),
    "a batch of one": (
        {"batch": {"global_batch_size": 1}},
        "TMP/r.yaml: batch.global_batch_size=1 leaves the similarity loss without other texts: raise the "
        "batch size, or set distil.similarity_weight=0",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_one_line(
    name: str,
    values: dict[str, Any],
    tmp_path: Path,
    tiny_model_dir: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, line = MISTAKES[name]
    texts = Path(values["data"]["path"]).read_text().splitlines()[:4]
    (tmp_path / "few.txt").write_text("\n".join(texts) + "\n")
    few = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    np.save(tmp_path / "bare.npy", few)
    np.save(tmp_path / "few.npy", few)
    note = teacher_vectors.VectorNote(
        "k", "m", str(tmp_path / "few.txt"), "text", None, False, 0, 4, 4, 40, "0.2"
    )
    note.write(tmp_path / "few.npy")
    np.save(tmp_path / "changed.npy", few)
    replace(note, input_key="another").write(tmp_path / "changed.npy")
    (tmp_path / "one.txt").write_text(texts[0] + "\n")
    few[2, 3] = np.nan
    np.save(tmp_path / "nan.npy", few)
    note.write(tmp_path / "nan.npy")
    shutil.copytree(teacher, tmp_path / "code")
    modules = json.loads((tmp_path / "code" / "modules.json").read_text())
    modules[1]["type"] = "planted.Pooling"
    (tmp_path / "code" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "code" / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    def filled(text: str) -> str:
        return text.replace("TMP", str(tmp_path)).replace("MODEL", str(tiny_model_dir))

    changes = json.loads(filled(json.dumps(changes)))
    if "data" in changes:
        values["batch"]["global_batch_size"] = 4
        changes["data"] = {"path": changes["data"], "held_out_path": changes.pop("held_out", None)}
    else:
        values["data"].pop("held_out_path")
    file = write_recipe({**values, **changes}, tmp_path / "r.yaml")
    assert run(monkeypatch, "train", file) == 2
    assert_reads(error_line(capsys), filled(line))
    assert not (tmp_path / "ran").exists()


def test_simcse_beside_it_is_that_of_the_stage(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"max_steps": 2, "optimizer": {"lr": 1e-9}, **NO_DROPOUT}
    del values["data"]["held_out_path"]
    values["distil"] |= {"simcse_weight": 0.5, "simcse_scale": 7.0}
    both = lines(train(parse_recipe(values)) / "metrics.jsonl")
    own = {key: value for key, value in values.items() if key != "distil"}
    own |= {"stage": "simcse", "simcse": {"scale": 7.0, "attention_dropout": 0.0}}
    plain = lines(train(parse_recipe({**own, "output_dir": str(tmp_path / "plain")})) / "metrics.jsonl")
    for row, other in zip(both, plain, strict=True):
        assert row["simcse_loss"] == pytest.approx(other["loss"], rel=1e-5)
        together = row["vector_loss"] + row["similarity_loss"] + 0.5 * row["simcse_loss"]
        assert row["loss"] == pytest.approx(together, rel=1e-6)
        assert row["n_tokens"] == other["n_tokens"]
