"""Evaluation while training: measured when due, the same on two ranks, and the best step's encoder kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds import Encoder
from llm2vec_ds.engine.deepspeed_engine import Engine
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.in_training import in_training_evaluation
from llm2vec_ds.evaluate.sts import load_graded_pairs, sts_spearman
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.recipe.sections import EvaluationConfig
from tests.support.evaluation_files import conllu, pairs_file
from tests.support.runs import command, noise_in, recipe, write_recipe


def held_out(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_best_step_is_kept(tiny_model_dir: Path, texts_file: Path, tmp_path: Path, ranks: int) -> None:
    pairs = pairs_file(tmp_path)
    values = recipe(
        "simcse",
        tiny_model_dir,
        texts_file,
        tmp_path / "run",
        evaluation={"tasks": [f"sts:{pairs}"], "every_steps": 2},
        checkpoint={"best_by": "STS-pairs", "lowest_is_best": False, "every_steps": 0},
        optimizer={"lr": 0.02, "warmup_steps": 1},
        **({"deepspeed": "ds_configs/zero3.json"} if ranks == 2 else {}),
    )
    outcome = command(["train", str(write_recipe(values, tmp_path / "recipe.yaml"))], ranks)
    assert not noise_in(outcome.stderr)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    rows = held_out(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    scores = [row["STS-pairs"] for row in rows]
    assert len(set(scores)) > 1
    encoder = Encoder.from_pretrained(tmp_path / "run" / "encoder", attention="torch")
    assert sts_spearman(encoder, load_graded_pairs(pairs)) == pytest.approx(max(scores[1:]), abs=1e-3)


def test_a_step_without_a_measurement_changes_no_mode(
    tiny_model_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    change = Engine.train

    def noted(engine: Engine, mode: bool = True) -> None:
        modes.append(mode)
        change(engine, mode)

    monkeypatch.setattr(Engine, "train", noted)
    values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run", max_steps=5)
    train(
        parse_recipe({**values, "evaluation": {"tasks": ["sts:x.csv"], "every_steps": 2}}), lambda encoder: {}
    )
    assert modes == [False, True, True, False, True, True, False, True, False]


def test_words_and_sentences_of_an_encoder(tiny_model_dir: Path, tmp_path: Path) -> None:
    pairs, file = pairs_file(tmp_path), conllu(tmp_path / "a.conllu", 20)
    words = {"train": str(file), "test": str(file), "max_steps": 20}
    config = EvaluationConfig.model_validate({"tasks": [f"sts:{pairs}"], "words": words})
    encoder = Encoder.from_pretrained(tiny_model_dir, attention="torch")
    scores = in_training_evaluation(config)(encoder)
    assert list(scores) == ["STS-pairs", "words_same_token", "words_next_token"]
    assert scores["STS-pairs"] == pytest.approx(sts_spearman(encoder, load_graded_pairs(pairs)), abs=1e-4)


def test_a_recipe_leaves_out_a_querys_own_document(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"_id": str(i), "text": f"river number {i} runs"} for i in range(3)]
    for name in ("corpus", "queries"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t0\t1\n")
    encoder = Encoder.from_pretrained(tiny_model_dir)
    found = []
    for exclude_self in (False, True):
        config = EvaluationConfig(tasks=[f"retrieval:{tmp_path}"], exclude_self=exclude_self)
        found += in_training_evaluation(config)(encoder).values()
    assert found == [1.0, 0.0]  # the only right document is the query's own


def test_mistakes(tiny_model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluation measures nothing"):
        in_training_evaluation(EvaluationConfig())
    with pytest.raises(UserError, match="no such file"):
        in_training_evaluation(EvaluationConfig(tasks=["sts:no/such.csv"]))
    values = recipe("simcse", tiny_model_dir, texts_file, tmp_path, checkpoint={"best_by": "STS-pairs"})
    with pytest.raises(UserError, match="needs held-out texts or an evaluation"):
        parse_recipe(values)
