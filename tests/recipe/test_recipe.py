"""Recipes: precedence, and mistakes that name their fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.files import dump_recipe, load_recipe, load_stages
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe

MINIMAL = {"stage": "mntp", "model": {"path": "m"}, "data": {"path": "t.txt"}, "output_dir": "o"}


def write(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_override_beats_recipe_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "seed": 7, "optimizer": {"lr": 1e-3}})
    recipe = load_recipe(path, ["optimizer.lr=3e-5", "adapter=null", "batch.global_batch_size=64"])
    assert (recipe.seed, recipe.optimizer.lr, recipe.adapter) == (7, 3e-5, None)
    assert recipe.batch.global_batch_size == 64
    assert recipe.optimizer.max_grad_norm == 1.0


def test_override_reaches_into_a_section_that_the_recipe_leaves_out(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), ["mntp.mask_rate=0.3"]).mntp.mask_rate == 0.3  # type: ignore[union-attr]


STAGED: dict[str, Any] = {
    "model": {"path": "m"},
    "output_dir": "runs/x",
    "batch": {"global_batch_size": 8},
    "stages": {
        "mntp": {"data": {"path": "t.txt"}, "mntp": {"mask_rate": 0.5}},
        "simcse": {"data": {"path": "s.txt"}, "batch": {"micro_batch_tokens": 512}},
    },
}


SUPERVISED = {"data": {"path": "p.jsonl"}, "model": {"path": "runs/x/mntp/encoder"}}
"""As the paper: beside SimCSE, not after it."""


def test_a_chosen_stage_starts_from_the_model_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, STAGED)
    (simcse,) = load_stages(path, ["stage=simcse", "model.path=mine"])
    assert simcse.model.path == "mine"


def test_a_new_output_dir_moves_the_stages_that_a_file_names(tmp_path: Path) -> None:
    path = write(tmp_path, {**STAGED, "stages": {**STAGED["stages"], "supervised": SUPERVISED}})
    for recipe in load_stages(path, ["output_dir=runs/y"])[1:]:
        assert recipe.model.path == "runs/y/mntp/encoder"
    elsewhere = {**SUPERVISED, "model": {"path": "runs/z/mntp/encoder"}}
    path = write(tmp_path, {**STAGED, "stages": {**STAGED["stages"], "supervised": elsewhere}})
    assert load_stages(path, ["output_dir=runs/y"])[2].model.path == "runs/z/mntp/encoder"


def test_a_stage_starts_where_the_one_before_writes(tmp_path: Path) -> None:
    mntp = {**STAGED["stages"]["mntp"], "output_dir": "runs/special"}
    path = write(tmp_path, {**STAGED, "stages": {**STAGED["stages"], "mntp": mntp}})
    first, second = load_stages(path)
    assert (first.output_dir, second.model.path) == ("runs/special", "runs/special/encoder")
    assert second.output_dir == "runs/x/simcse"


def test_pairs_are_for_the_stages_that_read_them(tmp_path: Path) -> None:
    path = write(tmp_path, {**STAGED, "stages": {**STAGED["stages"], "supervised": SUPERVISED}})
    mntp, _, supervised = load_stages(path, ["data.pairs.max_negatives=3"])
    assert (mntp.data.pairs, supervised.data.pairs.max_negatives) == (None, 3)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="`data.pairs` has no effect in stage `mntp`"):
        load_stages(write(tmp_path, STAGED), ["data.pairs.max_negatives=3"])


def test_a_file_of_several_stages(tmp_path: Path) -> None:
    path = write(tmp_path, STAGED)
    mntp, simcse = load_stages(path, ["seed=3", "mntp.mask_rate=0.3", "model.path=other"])
    assert (mntp.stage, mntp.model.path, mntp.output_dir) == ("mntp", "other", "runs/x/mntp")
    assert mntp.mntp is not None
    assert mntp.mntp.mask_rate == 0.3
    assert (simcse.stage, simcse.model.path) == ("simcse", "runs/x/mntp/encoder")
    assert (simcse.batch.global_batch_size, simcse.batch.micro_batch_tokens) == (8, 512)
    assert mntp.seed == simcse.seed == 3
    (only,) = load_stages(path, ["stage=simcse", "output_dir=runs/y"])
    assert (only.model.path, only.output_dir) == ("runs/y/mntp/encoder", "runs/y/simcse")
    assert load_recipe(path, ["stage=simcse"]).stage == "simcse"


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, [], "has the stages mntp, simcse: name one, e.g. stage=mntp"),
        ({}, ["stage=supervised"], "has no stage 'supervised': it has mntp, simcse"),
        ({}, ["distil.teacher=t"], "has no stage distil: leave distil.teacher=t out"),
        ({"stages": {"first": {}}}, [], "the keys of `stages` must be among mntp, simcse, supervised"),
        ({"sede": 1}, [], "stage mntp: unknown key `sede`"),
    ],
)
def test_mistakes_with_stages(
    tmp_path: Path, changes: dict[str, object], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, {**STAGED, **changes}), overrides)
    assert message in str(caught.value)


def test_written_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = parse_recipe({**MINIMAL, "stage": "simcse", "simcse": {"scale": 30}})
    dump_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "unknown key `sede`: did you mean `seed`?"),
        ("optimizer.learning_rate=1", "unknown key `optimizer.learning_rate`: set `optimizer.lr`"),
        ("adapter.rnk=4", "unknown key `adapter.rnk`: did you mean `adapter.rank`?"),
        ("max_steps=0", "`max_steps`"),
        ("stage=mtnp", "`stage`"),
        ("batch.global_batch_size=many", "`batch.global_batch_size`"),
        ("optimizer.lr=.inf", "`optimizer.lr`: must be a finite number"),
        ("optimizer.weight_decay=.nan", "`optimizer.weight_decay`"),
        ("optimizer.max_grad_norm=.inf", "`optimizer.max_grad_norm`"),
        ("adapter.alpha=inf", "`adapter.alpha`"),
        ("step_timeout_s=.inf", "`step_timeout_s`"),
        ("simcse.scale=20", "section `simcse` has no effect in stage `mntp`"),
        ("seed", "is not key=value"),
        ("model.path=", "model.path= has no value: is a shell variable empty?"),
        ("adapter=none", "`adapter` is a section: set its keys, such as `adapter.variant`, or adapter=null"),
        ("seed.x=1", "`seed` is a single value"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, {**MINIMAL, "seed": 1})
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a list", "{unclosed", "just words", ""])
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="recipe"):
        load_recipe(path)


def test_missing_file_and_missing_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="`model` is missing; `data` is missing"):
        load_recipe(write(tmp_path, {"stage": "mntp", "output_dir": "o"}))


def test_every_field_is_documented() -> None:
    def undocumented(section: type) -> list[str]:
        return [name for name, field in section.model_fields.items() if not field.description]  # type: ignore[attr-defined]

    from llm2vec_ds.recipe import objectives, sections

    named = [*vars(sections).values(), *vars(objectives).values(), Recipe]
    documented = [c for c in named if isinstance(c, type) and issubclass(c, sections.Section)]
    missing = {c.__name__: undocumented(c) for c in documented}
    own_name_says_it = {
        "model",
        "data",
        "pairs",
        "batch",
        "optimizer",
        "adapter",
        "checkpoint",
        "evaluation",
        "machine",
        "mntp",
        "simcse",
        "supervised",
        "path",
    }
    assert not {
        c: set(names) - own_name_says_it for c, names in missing.items() if set(names) - own_name_says_it
    }
    assert Recipe in documented


def test_epochs_say_how_many_steps_there_are() -> None:
    values = {**MINIMAL, "optimizer": {"warmup_steps": 5}, "max_steps": 5}
    assert parse_recipe(values).with_steps_of_epochs(7).max_steps == 5
    for epochs, steps_per_epoch, expected in ((2, 7, 14), (1.5, 7, 11), (0.5, 30, 15), (0.7, 10, 7)):
        recipe = parse_recipe({**values, "epochs": epochs}).with_steps_of_epochs(steps_per_epoch)
        assert recipe.max_steps == expected
    with pytest.raises(UserError, match="epochs=0.5: optimizer.warmup_steps=5 is more than max_steps=4"):
        parse_recipe({**values, "epochs": 0.5}).with_steps_of_epochs(7)
    assert parse_recipe({**values, "max_steps": 1, "epochs": 1}).epochs == 1  # the warm-up is judged later
    for wrong in (0, -1, "many"):
        with pytest.raises(UserError, match="`epochs`"):
            parse_recipe({**values, "epochs": wrong})


@pytest.mark.parametrize(
    ("given", "expected"), [("csv", ["csv"]), (["csv", "wandb"], ["csv", "wandb"]), (None, [])]
)
def test_monitor_is_a_word_or_a_list(given: Any, expected: list[str]) -> None:
    assert parse_recipe({**MINIMAL, "monitor": given}).monitor == expected
    with pytest.raises(UserError, match="`monitor"):
        parse_recipe({**MINIMAL, "monitor": "mlflow"})


def test_one_pair_a_batch_is_fine_with_hard_negatives() -> None:
    values = {**MINIMAL, "stage": "supervised", "batch": {"global_batch_size": 1}}
    assert parse_recipe(values).batch.global_batch_size == 1


def test_a_former_key_is_read_and_its_name_of_today_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {**MINIMAL, "batch": {"max_tokens_per_micro_batch": 512}})
    assert load_recipe(path).batch.micro_batch_tokens == 512
    assert "`batch.max_tokens_per_micro_batch` is called `batch.micro_batch_tokens` now" in caplog.text
    with pytest.raises(UserError, match="both are set"):
        load_recipe(path, ["batch.micro_batch_tokens=256"])
    given = ["batch.max_tokens_per_micro_batch=256"]
    assert load_recipe(write(tmp_path, MINIMAL), given).batch.micro_batch_tokens == 256
