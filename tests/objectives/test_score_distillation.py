"""Distillation from scores: the loss in double precision, the same on any ranks, learned."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2vec_ds.data.prompts import Prompt
from llm2vec_ds.engine.run import train
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.score_distillation.loss import ScoreLoss
from llm2vec_ds.objectives.score_distillation.score_table import ScoreTable, prepare_scores
from llm2vec_ds.recipe.objectives import DistilScoresConfig
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.global_batch import outcome, train_cases
from tests.support.in_process import assert_reads, error_line, run
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, ROOT, write_recipe
from tests.support.tiny import sentences

N_NEGATIVES = [2, 0, 3, 1]


@pytest.mark.parametrize(
    "config", [{"loss": "kl", "scale": 3.0, "temperature": 0.5}, {"loss": "margin_mse", "scale": 2.0}]
)
def test_value_and_gradients_in_double_precision(config: dict[str, Any]) -> None:
    """Query by query, document by document."""
    generator = torch.Generator().manual_seed(1)
    n = len(N_NEGATIVES)
    query_of = [*range(n), *(i for i, count in enumerate(N_NEGATIVES) for _ in range(count))]
    query = torch.randn(n, 5, generator=generator)
    document, score = (
        torch.randn(len(query_of), 5, generator=generator),
        torch.randn(len(query_of), generator=generator),
    )
    leaves = [x.clone().requires_grad_() for x in (query, document)]
    loss = ScoreLoss(DistilScoresConfig(**config))
    value, hits = loss(leaves[0], leaves[1], torch.tensor(query_of), score)
    double = [x.double().requires_grad_() for x in (query, document)]
    total, n_alike = torch.zeros((), dtype=torch.float64), 0
    for i in range(n):
        own = [j for j, of in enumerate(query_of) if of == i]
        found = torch.stack(
            [
                config["scale"] * (double[0][i] @ double[1][j]) / double[0][i].norm() / double[1][j].norm()
                for j in own
            ]
        )
        wanted = score[own].double()
        n_alike += int(found.argmax() == wanted.argmax())
        if config["loss"] == "kl":
            p, q = (wanted / config["temperature"]).softmax(0), found.softmax(0)
            total = total + (p * (p / q).log()).sum()
        elif len(own) > 1:
            total = total + ((found[0] - found[1:]) - (wanted[0] - wanted[1:])).square().mean()
    assert value.item() == pytest.approx(total.item(), rel=1e-5)
    assert int(hits) == n_alike
    for one, other in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(total, double), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def values(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """24 examples with 1 to 2 negatives, which a judge has scored by their length."""
    texts, rows = sentences(96, seed=4), []
    for i in range(24):
        query, *documents = texts[4 * i : 4 * i + 3 + i % 2]
        scores = [len(text) / 40 for text in documents]
        rows.append({"query": query, "positive": documents[0], "negative": documents[1:], "scores": scores})
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "stage": "distil_scores",
        "model": {"path": str(tiny_model_dir)},
        "data": {"path": str(path), "max_tokens": 32, "pairs": {"max_negatives": 2}},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "batch": {"global_batch_size": 12, "micro_batch_tokens": 2048},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "adapter": NO_DROPOUT["adapter"],
        "distil_scores": {"scale": 5.0},
    }


def test_the_same_on_ranks_stages_and_micro_batches(values: dict[str, Any], tmp_path: Path) -> None:
    cases = [(1, 0, 2048), (1, 0, 100), (2, 2, 100), (2, 3, 2048)]
    recipes = [
        {
            **values,
            "output_dir": str(tmp_path / f"{world}-{zero}-{tokens}"),
            "deepspeed": str(ROOT / f"ds_configs/zero{zero}.json") if zero else None,
            "batch": {"global_batch_size": 12, "micro_batch_tokens": tokens},
        }
        for world, zero, tokens in cases
    ]
    train_cases(0, 1, recipes[:2])
    run_ranks(partial(train_cases, recipes=recipes[2:]), 2)
    (rows, weights), *others = map(outcome, recipes)
    for other_rows, other_weights in others:
        for row, other in zip(rows, other_rows, strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
            assert other["accuracy"] == pytest.approx(row["accuracy"])
        for name, weight in other_weights.items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5)


def test_a_pair_without_a_score_is_named(values: dict[str, Any]) -> None:
    """And is not given another pair's."""
    recipe = parse_recipe(values)
    table = ScoreTable(prepare_scores(recipe, recipe.data.path))
    row = json.loads(Path(values["data"]["path"]).read_text().splitlines()[5])
    query, first, second = (Prompt(None, text).hash() for text in (row["query"], *row["negative"]))
    found = table(np.array([query, query]), np.array([first, second]))
    torch.testing.assert_close(found, torch.tensor(row["scores"][1:]))
    with pytest.raises(UserError, match="1 of 2 documents of a batch have no score"):
        table(np.array([query, query]), np.array([first, query]))


def test_bad_rows_may_be_left_out_and_the_first_pairs_taken(values: dict[str, Any]) -> None:
    file = Path(values["data"]["path"])
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([first, '{"query": 1}', "{broken", *others]))
    with pytest.raises(UserError, match="line 2: "):
        prepare_scores(recipe := parse_recipe(values), recipe.data.path)
    values["data"] |= {"bad_rows": "skip", "max_texts": 16}
    train(parse_recipe(values))


@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
def test_it_learns(
    loss: str,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values["data"] |= {"held_out_path": values["data"]["path"], "instruction": "Find:"}
    values |= {"max_steps": 30, "optimizer": {"lr": 1e-2}}
    file = write_recipe(values, tmp_path / "r.yaml")
    assert run(monkeypatch, "prepare", file) == 0
    assert run(monkeypatch, "train", file, f"distil_scores.loss={loss}") == 0
    held_out = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert held_out[-1]["loss"] < held_out[0]["loss"] / 2
    assert held_out[-1]["accuracy"] >= held_out[0]["accuracy"]
    capsys.readouterr()
    assert run(monkeypatch, "plan", file, "--gpus-per-node", 2, "--gpu-memory-gib", 24) == 0
    shown = capsys.readouterr().out
    # The loss needs all vectors of the batch, but compares a query with its own documents only.
    assert "batch.global_batch_size=" in shown
    assert "negatives for a query" not in shown


MISTAKES: dict[str, tuple[Any, str]] = {
    "no column": (
        {"scores": ...},
        "…, line 1: no column 'scores': set distil_scores.score_column to one of …",
    ),
    "too few": (
        {"scores": [1]},
        "…, line 1: column 'scores' has 1 scores for 2 documents (the positive, then the negatives): give "
        "one score per document",
    ),
    "no numbers": (
        {"scores": [1, "a", 2]},
        "…, line 1: column 'scores' is no list of finite numbers: write it with llm2vec-ds score",
    ),
    "no negatives": (
        "data.pairs.max_negatives=0",
        "…: data.pairs.max_negatives=0 leaves the distil_scores loss nothing to compare with: raise it",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_one_line(
    name: str,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, line = MISTAKES[name]
    path = Path(values["data"]["path"])
    first, *rows = path.read_text().splitlines()
    row = json.loads(first)
    if isinstance(change, dict):
        row = {key: value for key, value in {**row, **change}.items() if value is not ...}
    path.write_text("\n".join([json.dumps(row), *rows]) + "\n")
    overrides = [change] if isinstance(change, str) else []
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml"), *overrides) == 2
    assert_reads(error_line(capsys), line)
