"""A guide in the supervised stage: its vectors by role and text, what it leaves out, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F

from llm2vec_ds.data.pairs import load_prepared_pairs, prepare_pairs
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.contrastive.guide import GuideVectors, wanted_of_guide
from llm2vec_ds.objectives.teacher_vectors import keep_vectors
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe
from tests.support.in_process import assert_reads, error_line, run
from tests.support.runs import write_recipe
from tests.support.teachers import save_teacher
from tests.support.tiny import sentences, tiny_tokenizer

TEXTS = sentences(60, seed=5)
ROWS = {
    "labels": [{"query": TEXTS[i], "positive": TEXTS[20 + i % 2], "negative": [TEXTS[22]]} for i in range(8)],
    "web": [
        {"query": TEXTS[i], "positive": TEXTS[i + 20], "negative": TEXTS[i + 40 : i + 42]}
        for i in range(8, 18)
    ],
}
INSTRUCTIONS = (
    "labels: {query: Say, group: all, in_batch_negatives: false}\nweb: {document: fish, group: all}\n"
)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("guide"))


@pytest.fixture
def values(tiny_model_dir: Path, tmp_path: Path, guide: Path) -> dict[str, Any]:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "instructions.yaml").write_text(INSTRUCTIONS)
    pairs = {"max_negatives": 2, "instructions": str(tmp_path / "instructions.yaml")}
    return {
        "stage": "supervised",
        "model": {"path": str(tiny_model_dir)},
        "data": {
            "path": str(folder),
            "pairs": pairs,
            "max_tokens": 64,
            "prepared_dir": str(tmp_path / "prepared"),
            "held_out_path": str(folder),
        },
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "batch": {"global_batch_size": 9, "micro_batch_tokens": 200},
        "optimizer": {"lr": 1e-3},
        "supervised": {"guide": str(guide), "guide_ratio": 0.9, "scale": 5.0},
    }


def vectors_of(recipe: Recipe) -> tuple[GuideVectors, Any]:
    for wanted in wanted_of_guide(recipe):
        keep_vectors(wanted)
    pairs = load_prepared_pairs(prepare_pairs(recipe.data, recipe.data.path, tiny_tokenizer()))
    return GuideVectors(recipe, pairs), pairs


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_vectors_are_those_of_the_role_and_the_text(values: dict[str, Any], guide: Path) -> None:
    from sentence_transformers import SentenceTransformer

    values["supervised"] |= {"guide_query_prompt": "the ", "guide_document_prompt": "an "}
    vectors, pairs = vectors_of(parse_recipe(values))
    found = vectors(pairs[[0, 9]])
    model, (label, web) = SentenceTransformer(str(guide), device="cpu"), (ROWS["labels"][0], ROWS["web"][1])
    wanted = (
        [f"the {row['query']}" for row in (label, web)],
        [f"an {row['positive']}" for row in (label, web)],
        [f"an {text}" for row in (label, web) for text in row["negative"]],
    )
    for ours, texts in zip(found, wanted, strict=True):
        expected = F.normalize(model.encode(texts, convert_to_tensor=True), dim=-1)
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_vectors_that_encode_wrote_guide_as_their_model_does(
    values: dict[str, Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Encoder.from_pretrained(tiny_model_dir, settings={"pooling": "last"}).save(tmp_path / "own")
    (tmp_path / "all.txt").write_text("\n".join(reversed(TEXTS)) + "\n")
    encode = ("encode", "--model", tmp_path / "own", "--input", tmp_path / "all.txt", "--output")
    assert run(monkeypatch, *encode, tmp_path / "v.npy") == 0
    found = []
    for guide in (tmp_path / "own", tmp_path / "v.npy"):
        vectors, pairs = vectors_of(parse_recipe({**values, "supervised": {"guide": str(guide)}}))
        found.append(vectors(pairs[range(len(pairs))]))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-5)


def test_it_trains_counts_by_source_and_goes_on(
    values: dict[str, Any], tmp_path: Path, guide: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llm2vec_ds")
    train(parse_recipe({**values, "max_steps": 2}))
    shutil.copytree(guide, tmp_path / "moved")
    values["supervised"]["guide"] = str(tmp_path / "moved")
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="max_steps was 2, now 4"):
        train(parse_recipe({**values, "resume": True}))
    (tmp_path / "instructions.yaml").write_text(INSTRUCTIONS.replace("false", "true"))
    with pytest.raises(UserError, match="the training data have changed"):
        train(parse_recipe({**values, "max_steps": 2, "resume": True}))
    (tmp_path / "instructions.yaml").write_text(INSTRUCTIONS)
    train(parse_recipe({**values, "max_steps": 2, "resume": True}))
    guided = lines(folder / "metrics.jsonl")
    assert {"guided_out/web", "negatives/web"} <= guided[0].keys()
    # A query of `labels` has one negative, its own; one of `web` all documents but its positive.
    for row in guided:
        n_labels = row.get("negatives/labels", 0)
        n_documents = 9 + n_labels + 2 * (9 - n_labels)
        assert row["negatives/web"] == (9 - n_labels) * (n_documents - 1)
        assert 0 < row["guided_out/web"] < row["negatives/web"]
    assert "in 1 step(s) the guide has left out: " in caplog.text
    assert "labels: each query is compared with its own hard negatives only" in caplog.text
    values["supervised"] = {"scale": 5.0}
    train(parse_recipe({**values, "max_steps": 2, "output_dir": str(tmp_path / "plain")}))
    plain = lines(tmp_path / "plain" / "metrics.jsonl")
    assert guided[0]["loss"] < plain[0]["loss"]  # fewer negatives
    assert not [key for key in plain[0] if "guided" in key]
    held_out = [lines(tmp_path / name / "held_out.jsonl")[0] for name in ("run", "plain")]
    assert held_out[0]["loss"] == held_out[1]["loss"]


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "margin without guide": (
        {"guide": None, "guide_margin": 0.1},
        INSTRUCTIONS,
        "TMP/r.yaml: supervised.guide_margin does nothing without supervised.guide: set the guide, or leave "
        "it out",
    ),
    "no guide": ({"guide": "TMP/none"}, INSTRUCTIONS, "supervised.guide TMP/none: there is no such folder"),
    "texts missing": (
        {"guide": "TMP/few.npy"},
        INSTRUCTIONS,
        "supervised.guide has no vector for 14 of the 18 queries of data.path: encode these texts with the "
        "guide, or set supervised.guide to a model",
    ),
    "prompt for vectors": (
        {"guide": "TMP/few.npy", "guide_query_prompt": "query: "},
        INSTRUCTIONS,
        "supervised.guide TMP/few.npy holds finished vectors, which a prompt cannot change: remove the "
        "prompt",
    ),
    "nothing to compare with": (
        {"guide": None},
        INSTRUCTIONS.replace("web: {", "web: {in_batch_negatives: false, "),
        "TMP/instructions.yaml: `web` has in_batch_negatives: false, and 1 of its 10 examples have no hard "
        "negative, so their loss is always 0: give each one (data.pairs.negative_column, "
        "data.pairs.max_negatives), or remove in_batch_negatives",
    ),
    "neither true nor false": (
        {"guide": None},
        INSTRUCTIONS.replace("false", "never"),
        "TMP/instructions.yaml: `labels.in_batch_negatives` must be true or false",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_one_line(
    name: str,
    values: dict[str, Any],
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, instructions, line = MISTAKES[name]
    (tmp_path / "instructions.yaml").write_text(instructions)
    if "few.npy" in json.dumps(changes):
        (tmp_path / "few.txt").write_text("\n".join(TEXTS[:4]) + "\n")
        encode = ("encode", "--model", tiny_model_dir, "--input", tmp_path / "few.txt")
        assert run(monkeypatch, *encode, "--output", tmp_path / "few.npy") == 0
        capsys.readouterr()
    if name == "nothing to compare with":
        rows = [*ROWS["web"][:-1], {**ROWS["web"][-1], "negative": []}]
        path = tmp_path / "pairs" / "web.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["supervised"] = json.loads(json.dumps(changes).replace("TMP", str(tmp_path)))
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    assert_reads(error_line(capsys), line.replace("TMP", str(tmp_path)))
