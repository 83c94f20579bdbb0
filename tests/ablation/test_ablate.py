"""The ablation: which runs it needs, what it trains them with, that it goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2vec_ds.ablation.keys import evaluation_key, score_key
from llm2vec_ds.ablation.recipe import AblationRecipe, load_ablation, runs_of
from llm2vec_ds.ablation.run import Ablation, run_ablation, table
from llm2vec_ds.errors import UserError
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
    first = ablation._recipe("bi+mntp", 1)
    assert first.model.path == str(tiny_model_dir)
    assert (Path(str(first.data.path)).name, first.data.max_tokens) == ("paragraphs.txt", 64)
    assert first.max_steps == 2
    second = ablation._recipe("bi+mntp+simcse", 1)
    assert second.model.path == f"{first.output_dir}/encoder"
    assert (Path(str(second.data.path)).name, second.max_steps) == ("sentences.txt", 1)
    assert second.batch.global_batch_size == 4
    assert ablation._recipe("uni+simcse", 1).model.causal
    with pytest.raises(UserError, match=r"stages\.supervised\.data\.path is missing"):
        ablation._recipe("bi+supervised", 1)


def test_the_shipped_recipe_gives_valid_stages() -> None:
    for budget in ("quick", "cpu", "full", None):
        recipe = load_ablation(SHIPPED, budget)
        ablation = Ablation(recipe, budget, Path("out"), "model")
        for run in runs_of(recipe.variants):
            steps = ablation._stage_recipe(run, 42)["max_steps"]
            assert ablation._recipe(run, 42).max_steps == {"full": 1000}.get(budget or "", steps)
    taught = ablation._recipe("bi+mntp+self_distil", 42)
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
    slow = ablation._recipe("bi+simcse_slow", 1)
    assert (slow.stage, slow.max_steps, Path(str(slow.data.path)).name) == ("simcse", 5, "sentences.txt")
    assert slow.output_dir.endswith("bi+simcse_slow")
    plain = ablation._recipe("bi+simcse", 1)
    assert (plain.stage, plain.max_steps) == ("simcse", 2)
    assert [ablation.has_mntp(variant) for variant in recipe.variants] == [False, False, True, True]


def test_a_run_is_trained_again_if_anything_it_depends_on_has_changed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, ...]] = []
    monkeypatch.setattr("llm2vec_ds.process.child_command.run_command", lambda *a: trained.append(a[2:]))
    text = tmp_path / "own.txt"
    text.write_text("one text\n")

    def train(**changes: Any) -> int:
        stage = {"data": {"path": str(text)}, **changes}
        recipe = ablation_recipe(tmp_path, tiny_model_dir, variants=["bi+simcse"], stages={"simcse": stage})
        Ablation(recipe, None, tmp_path / "out", str(tiny_model_dir))._train("bi+simcse", 1)
        return len(trained)

    (tmp_path / "out").mkdir()
    assert (train(), train()) == (1, 1)
    text.write_text("another text, in the same place\n")
    assert (train(), train()) == (2, 2)
    assert (train(max_steps=7), train(max_steps=7)) == (3, 3)
    assert train() == 4, "the folder holds the run of the recipe in between"
    assert set(trained) == {()}, "none of these goes on with another run"


def test_a_stopped_run_goes_on_and_a_changed_one_starts_in_an_empty_folder(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ablation_recipe(tmp_path, tiny_model_dir, variants=["bi+simcse"])
    folder = tmp_path / "out" / "runs" / "seed-1" / "bi+simcse"
    calls: list[tuple[tuple[str, ...], bool]] = []

    def stopped(*arguments: str) -> int:
        calls.append((arguments[2:], folder.exists()))
        folder.mkdir(exist_ok=True)
        return 3

    monkeypatch.setattr("llm2vec_ds.process.child_command.run_command", stopped)
    for budget in (None, None, "quick", "quick"):
        ablation = Ablation(recipe, budget, tmp_path / "out", str(tiny_model_dir))
        folder.parent.mkdir(parents=True, exist_ok=True)
        ablation._write_texts()
        with pytest.raises(UserError, match="training stopped"):
            ablation._train("bi+simcse", 1)
    assert calls == [((), False), (("resume=true",), True), ((), False), (("resume=true",), True)]


def test_scores_are_measured_again_if_data_or_settings_have_changed(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    evaluate = ablation_recipe(tmp_path, tiny_model_dir).evaluate
    model = tmp_path / "encoder"
    shutil.copytree(tiny_model_dir, model)

    def key() -> str:
        return score_key(str(model), "bi", evaluation_key(evaluate))

    keys = [key()]
    assert key() == keys[0]
    pairs = Path(evaluate.sentences[0].removeprefix("sts:"))
    pairs.write_text(pairs.read_text().replace("the", "a", 1))
    keys.append(key())
    words = Path(evaluate.words["pos"].train)
    words.write_text(words.read_text().replace("NOUN", "VERB", 1))
    keys.append(key())
    (model / "llm2vec_ds.json").write_text('{"pooling": "last"}')
    keys.append(key())
    assert len(set(keys)) == 4


def test_a_mistake_in_a_later_stage_is_found_before_the_first_is_trained(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2vec_ds.process.child_command.run_command", lambda *a: pytest.fail("trained"))
    for supervised, message in (
        ({"max_steps": 2}, "stages.supervised.data.path is missing"),
        ({"data": {"path": "none.jsonl"}}, "none.jsonl not found"),
        ({"data": {"path": str(tmp_path / "text.txt")}, "max_step": 2}, "max_step"),
    ):
        recipe = ablation_recipe(
            tmp_path,
            tiny_model_dir,
            variants=["bi+simcse", "bi+supervised"],
            stages={"supervised": supervised},
        )
        with pytest.raises(UserError, match=message):
            run_ablation(recipe, None, tmp_path / "out")


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
    monkeypatch.setattr(
        "llm2vec_ds.process.child_command.run_command", lambda *a: pytest.fail("trained again")
    )
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


START = "variants: [uni]\nevaluate: {sentences: [sts:x.csv]}"


@pytest.mark.parametrize(
    ("values", "budget", "message"),
    [
        (f"{START}", "quick", "it has none"),
        ("variants: [uni+nli]\nevaluate: {sentences: [a]}", None, "write uni or bi, then stages"),
        ("variants: [uni, uni]\nevaluate: {}", None, "give at least one of the variants, and each only once"),
        (f"{START}\nseeds: []", None, "`seeds`"),
        (f"{START}\nsteps: 3", None, "`steps`"),
        (f"{START}\nstages: {{nli: {{}}}}", None, "stage 'nli' is unknown"),
        (f"{START}\nstages: {{nli: {{stage: nlp}}}}", None, "stage 'nli' is unknown"),
        (f"{START}\nstages: {{nli: {{stage: [mntp]}}}}", None, "stage 'nli' is unknown"),
        (f"{START}\nstages: {{mntp: {{stage: simcse}}}}", None, "give it another name"),
        (f"{START}\nstages: {{a/b: {{stage: simcse}}}}", None, "a name has letters"),
        (f"{START}\nbudgets: {{x: {{nli: {{}}}}}}", None, "not in `stages`"),
        (f"{START}\nbudgets: {{x: {{mntp: {{stage: x}}}}}}", None, "cannot change `stage`"),
        ("variants: [uni]\nevaluate: {}", None, "`evaluate` measures nothing"),
        (f"{START}\nstages: {{mntp: 5}}", None, "`stages.mntp`: write the keys of its recipe below it"),
        (f"{START}\nstages: {{mntp: {{seed: 7}}}}", None, "the ablation itself sets `seed`"),
        (
            f"{START}\nbudgets: {{x: {{mntp: {{output_dir: y}}}}}}",
            None,
            "the ablation itself sets `output_dir`",
        ),
        (f"{START}\nstages: {{mntp: {{data: my.txt}}}}", None, "`data` has keys of its own"),
        (f"{START}\nstages: {{distil: {{distil: minilm}}}}", None, "`distil` has keys of its own"),
        (f"{START}\nbudgets: {{x: {{mntp: {{model: [a]}}}}}}", None, "`model` has keys of its own"),
        (f"{START}\nseeds: [1, 1]", None, "give at least one of the seeds, and each only once"),
        (f"{START}\nseeds: [-1]", None, "greater than or equal to 0"),
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
