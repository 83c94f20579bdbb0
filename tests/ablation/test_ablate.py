"""The ablation: which runs it needs, what it trains them with, that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2vec_ds.ablation.recipe import AblationRecipe, load_ablation, runs_of
from llm2vec_ds.ablation.run import Ablation, run_ablation, table
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.evaluation_files import conllu, pairs_file
from tests.support.tiny import text_file

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "recipes" / "smollm2_ablation.yaml"


def ablation_recipe(folder: Path, model: Path, **changes: Any) -> AblationRecipe:
    words = conllu(folder / "words.conllu", 20)
    stage = {"max_steps": 2, "batch": {"global_batch_size": 4}, "data": {"max_tokens": 64}}
    values = {
        "model": str(model),
        "text": str(text_file(folder)),
        "variants": ["uni", "bi", "bi+mntp", "bi+mntp+simcse"],
        "seeds": [1],
        "stages": {"mntp": {**stage, "adapter": {"rank": 2}}, "simcse": stage},
        "budgets": {"quick": {"simcse": {"max_steps": 1}}},
        "evaluate": {
            "sentences": [f"sts:{pairs_file(folder)}"],
            "words": {"pos": {"train": str(words), "test": str(words), "max_steps": 20}},
        },
        **changes,
    }
    return AblationRecipe.model_validate(values)


def test_each_run_comes_after_the_one_it_starts_from_and_once() -> None:
    variants = ["uni", "bi", "bi+mntp+simcse", "bi+mntp", "bi+simcse", "bi+mntp+supervised"]
    assert list(runs_of(variants)) == ["bi+mntp", "bi+mntp+simcse", "bi+simcse", "bi+mntp+supervised"]


def test_stage_recipes_are_valid_and_chained(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = ablation_recipe(tmp_path, tiny_model_dir)
    ablation = Ablation(recipe, "quick", tmp_path / "out", str(tiny_model_dir))
    texts = {name: f"{name}.txt" for name in ("paragraphs", "held_out", "sentences")}
    first = parse_recipe(ablation._stage_recipe("bi+mntp", "mntp", ablation.folder("bi", 1), 1, texts))
    assert first.model.path == str(tiny_model_dir)
    assert (first.data.path, first.data.max_tokens, first.max_steps) == ("paragraphs.txt", 64, 2)
    start = ablation.folder("bi+mntp", 1)
    second = parse_recipe(ablation._stage_recipe("bi+mntp+simcse", "simcse", start, 1, texts))
    assert second.model.path == f"{first.output_dir}/encoder"
    assert (second.data.path, second.max_steps, second.batch.global_batch_size) == ("sentences.txt", 1, 4)
    causal = ablation._stage_recipe("uni+simcse", "simcse", ablation.folder("uni", 1), 1, texts)
    assert parse_recipe(causal).model.causal
    with pytest.raises(UserError, match=r"stages\.supervised\.data\.path is missing"):
        ablation._stage_recipe("bi+supervised", "supervised", "x", 1, texts)


def test_the_shipped_recipe_gives_valid_stages() -> None:
    for budget in ("quick", "cpu", "full", None):
        recipe = load_ablation(SHIPPED, budget)
        ablation = Ablation(recipe, budget, Path("out"), "model")
        texts = dict.fromkeys(("paragraphs", "held_out", "sentences"), "x.txt")
        for run in runs_of(recipe.variants):
            values = ablation._stage_recipe(run, run.rpartition("+")[2], "model", 42, texts)
            assert parse_recipe(values).max_steps == {"full": 1000}.get(budget or "", values["max_steps"])
    taught = parse_recipe(ablation._stage_recipe("bi+mntp+self_distil", "self_distil", "trained", 42, texts))
    assert (taught.stage, taught.distil.teacher, taught.distil.teacher_layer) == ("distil", "model", 1)
    assert recipe.variants[:5] == ["uni", "bi", "bi+mntp", "bi+simcse", "bi+mntp+simcse"]
    changed = load_ablation(SHIPPED, None, ["seeds=[1,2]", "evaluate.words.pos.train=a.conllu"])
    assert (changed.seeds, changed.evaluate.words["pos"].train) == ([1, 2], "a.conllu")


def test_two_settings_of_one_stage_have_two_names(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = ablation_recipe(
        tmp_path,
        tiny_model_dir,
        variants=["bi+simcse", "bi+simcse_slow", "bi+no_mask", "uni+no_mask+simcse"],
        stages={
            "simcse": {"max_steps": 2},
            "simcse_slow": {"stage": "simcse", "max_steps": 9},
            "no_mask": {"stage": "mntp", "max_steps": 1},
        },
        budgets={"quick": {"simcse_slow": {"max_steps": 5}}},
    )
    ablation = Ablation(recipe, "quick", tmp_path / "out", str(tiny_model_dir))
    texts = {name: f"{name}.txt" for name in ("paragraphs", "held_out", "sentences")}
    slow = parse_recipe(ablation._stage_recipe("bi+simcse_slow", "simcse_slow", "model", 1, texts))
    assert (slow.stage, slow.max_steps, slow.data.path) == ("simcse", 5, "sentences.txt")
    assert slow.output_dir.endswith("bi+simcse_slow")
    plain = parse_recipe(ablation._stage_recipe("bi+simcse", "simcse", "model", 1, texts))
    assert (plain.stage, plain.max_steps) == ("simcse", 2)
    assert [ablation.has_mntp(variant) for variant in recipe.variants] == [False, False, True, True]


@pytest.mark.slow
def test_an_ablation_goes_on_where_it_stopped(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ablation_recipe(tmp_path, tiny_model_dir)
    output = tmp_path / "out"
    result = run_ablation(recipe, "quick", output)
    assert list(result["scores"]) == recipe.variants
    for by_seed in result["scores"].values():
        assert set(by_seed["1"]) >= {"STS-pairs", "pos"}
    # By the paper's protocol: shifted for what MNTP has trained.
    assert "pos, same_token" in result["scores"]["bi+mntp"]["1"]
    assert "pos, next_token" in result["scores"]["bi"]["1"]
    trained = {
        run: yaml.safe_load((output / "runs" / "seed-1" / run / "recipe.yaml").read_text())
        for run in runs_of(recipe.variants)
    }
    assert {run: values["max_steps"] for run, values in trained.items()} == {
        "bi+mntp": 2,
        "bi+mntp+simcse": 1,
    }
    totals = {run: by_seed["1"] for run, by_seed in result["runs"].items()}
    assert {run: values["steps"] for run, values in totals.items()} == {"bi+mntp": 2, "bi+mntp+simcse": 1}
    assert all(values["trained_tokens"] > 0 < values["training_s"] for values in totals.values())
    assert (output / "table.md").read_text().count("\n") == 2 + len(recipe.variants)
    monkeypatch.setattr("llm2vec_ds.ablation.run.run_command", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr("llm2vec_ds.evaluate.mteb.measure", lambda *a: pytest.fail("measured again"))
    assert run_ablation(recipe, "quick", output)["scores"] == result["scores"]
    assert json.loads((output / "results.json").read_text())["scores"] == result["scores"]


def test_an_ablation_writes_over_nothing_of_others(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = ablation_recipe(tmp_path, tiny_model_dir)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sentences.txt").write_text("precious")
    with pytest.raises(UserError, match=r"out holds sentences.txt, which would be overwritten"):
        run_ablation(recipe, "quick", tmp_path / "out")
    (tmp_path / "out" / "runs").mkdir()  # an ablation's folder
    own = recipe.model_copy(update={"text": str(tmp_path / "out" / "sentences.txt")})
    with pytest.raises(UserError, match=r"would overwrite .*sentences.txt, which is an input"):
        run_ablation(own, "quick", tmp_path / "out")
    assert (tmp_path / "out" / "sentences.txt").read_text() == "precious"


def test_means_and_spread_over_seeds() -> None:
    scores = {"uni": {"1": {"sts": 0.25}, "2": {"sts": 0.35}}, "bi": {"1": {"sts": 0.5, "pos": 0.75}}}
    assert table(scores).splitlines()[2:] == ["| uni | 0.300 ± 0.071 |  |", "| bi | 0.500 | 0.750 |"]


@pytest.mark.parametrize(
    ("values", "budget", "message"),
    [
        ("variants: [uni]\nevaluate: {}", "quick", "it has none"),
        ("variants: [uni+nli]\nevaluate: {}", None, "write uni or bi, then stages"),
        ("variants: [uni, uni]\nevaluate: {}", None, "give at least one variant, and each only once"),
        ("variants: [uni]\nevaluate: {}\nseeds: []", None, "`seeds`"),
        ("variants: [uni]\nevaluate: {}\nsteps: 3", None, "`steps`"),
        ("variants: [uni]\nevaluate: {}\nstages: {nli: {}}", None, "stage 'nli' is unknown"),
        ("variants: [uni]\nevaluate: {}\nstages: {nli: {stage: nlp}}", None, "stage 'nli' is unknown"),
        ("variants: [uni]\nevaluate: {}\nstages: {nli: {stage: [mntp]}}", None, "stage 'nli' is unknown"),
        ("variants: [uni]\nevaluate: {}\nstages: {mntp: {stage: simcse}}", None, "give it another name"),
        ("variants: [uni]\nevaluate: {}\nstages: {a/b: {stage: simcse}}", None, "a name has letters"),
        ("variants: [uni]\nevaluate: {}\nbudgets: {x: {nli: {}}}", None, "not in `stages`"),
        ("variants: [uni]\nevaluate: {}\nbudgets: {x: {mntp: {stage: x}}}", None, "cannot change `stage`"),
        ("- uni", None, "must be a YAML mapping"),
        ("a: [", None, "not valid YAML"),
    ],
)
def test_mistakes(values: str, budget: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    path.write_text(values)
    with pytest.raises(UserError, match=message) as caught:
        load_ablation(path, budget)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        load_ablation(tmp_path / "missing.yaml", None)
