"""Reads recipes from YAML files, with `key=value` overrides and with several stages in one file. Writes them.

A `key=value` on the command line overrides the file, and the file overrides the default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.habits import answer_to
from llm2vec_ds.recipe.objectives import SECTIONS
from llm2vec_ds.recipe.recipe import Recipe, parse_recipe
from llm2vec_ds.storage.durable import replace_file
from llm2vec_ds.storage.reading import parse_yaml, read_yaml_mapping


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe file, applies `key=value` overrides (dotted keys) and validates it.

    Raises:
        UserError: the file is missing or is no YAML mapping, a key is unknown, or a value is invalid. Or the
            file has several stages and no override picks one.
    """
    recipes = load_stages(path, overrides)
    if len(recipes) > 1:
        names = ", ".join(recipe.stage for recipe in recipes)
        raise UserError(f"recipe {path} has the stages {names}: name one, e.g. stage={recipes[0].stage}")
    return recipes[0]


def load_stages(path: str | Path, overrides: list[str] | None = None) -> list[Recipe]:
    """Reads the recipes of a file, in order: one, or one for each key of its `stages`.

    The keys of a stage override the keys beside `stages`. Each stage writes to a folder of its name in
    `output_dir`, unless it sets its own. It starts from the `encoder/` of the stage before, unless it sets
    `model.path`.

    The override `stage=NAME` picks one stage. `output_dir=` also changes a `model.path` that names an earlier
    stage's folder. `model.path=` applies to the first stage that runs, `data.pairs…=` to the stages that read
    pairs.

    Raises:
        UserError: as `load_recipe`.
    """
    values, given = read_recipe_file(Path(path)), overrides or []
    if "stages" not in values:
        for override in given:
            apply_override(values, override)
        return [parse_recipe(values, source=str(path))]
    stages = values.pop("stages")
    if not isinstance(stages, dict) or not stages or set(stages) - set(SECTIONS):
        raise UserError(f"recipe {path}: the keys of `stages` must be among {', '.join(SECTIONS)}")
    if strange := [name for name, own in stages.items() if own is not None and not isinstance(own, dict)]:
        raise UserError(f"recipe {path}: stage `{strange[0]}` has keys of its own: write them below it")
    chosen = next((o.partition("=")[2] for o in reversed(given) if o.startswith("stage=")), None)
    if chosen is not None and chosen not in stages:
        raise UserError(f"recipe {path} has no stage {chosen!r}: it has {', '.join(stages)}")
    for override in given:
        section = override.partition("=")[0].partition(".")[0]
        if section in SECTIONS and section not in stages:
            raise UserError(f"recipe {path} has no stage {section}: leave {override} out")
    first = chosen or next(iter(stages))
    recipes: list[Recipe] = []
    for name, own in stages.items():
        applied = [o for o in given if _is_for(o, name, is_first=name == first, stages=list(stages))]
        merged = _stage_values(values, name, own or {}, recipes, applied)
        recipes.append(parse_recipe(merged, source=f"{path}, stage {name}"))
    return [recipe for recipe in recipes if chosen is None or recipe.stage == chosen]


def _is_for(override: str, stage: str, *, is_first: bool, stages: list[str]) -> bool:
    """Returns whether an override applies to this stage of a file with `stages`."""
    key = override.partition("=")[0]
    if key == "model.path":
        return is_first
    if key == "data.pairs" or key.startswith("data.pairs."):
        readers = [name for name in stages if SECTIONS[name].reads_pairs]
        return stage in readers or not readers  # if no stage reads pairs, validation reports it
    section = key.partition(".")[0]
    return key != "stage" and (section not in SECTIONS or section == stage)


def _stage_values(
    common: dict[str, Any], name: str, own: dict[str, Any], before: list[Recipe], overrides: list[str]
) -> dict[str, Any]:
    values = laid_over(common, {"stage": name})
    written_root = values.get("output_dir")
    for override in [o for o in overrides if o.startswith("output_dir=")]:
        apply_override(values, override)
    root = values.get("output_dir")
    if root and isinstance(root, str):  # validation reports anything else
        values = laid_over(values, {"output_dir": f"{root}/{name}"})
    if before:
        values = laid_over(values, {"model": {"path": f"{before[-1].output_dir}/encoder"}})
    values = laid_over(values, own)
    moved = {f"{written_root}/{run.stage}/encoder": f"{root}/{run.stage}/encoder" for run in before}
    if isinstance(model := values.get("model"), dict):
        model["path"] = moved.get(str(model.get("path")), model.get("path"))
    for override in [o for o in overrides if not o.startswith("output_dir=")]:
        apply_override(values, override)
    return values


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns a new mapping with the keys of both. `above` wins, section by section."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in below.items()}
    for key, value in above.items():
        old = result.get(key)
        result[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Returns the keys and values of a YAML file.

    Raises:
        UserError: the file cannot be read, or is no YAML mapping.
    """
    remedy = "give the path of a YAML file. `llm2vec-ds init` writes recipes/"
    return read_yaml_mapping(path, f"recipe {path}", "keys to values", remedy)


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe with every default filled in, so that the run can be repeated."""
    values = recipe.model_dump(mode="json")
    replace_file(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def apply_override(values: dict[str, Any], override: str) -> None:
    """Puts one `key=value` (dotted key, YAML value) into `values`.

    Raises:
        UserError: it is not of this form, or a parent of the key is a single value.
    """
    key, equals, text = override.partition("=")
    if key.startswith("-"):
        answer = answer_to(key.lstrip("-"))
        here = f"; set {answer}" if answer else ""
        raise UserError(
            f"there is no option {key}: write recipe keys as key=value, e.g. optimizer.lr=1e-4{here}"
        )
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value, e.g. optimizer.lr=1e-4")
    if not text.strip():
        raise UserError(f"{override} has no value: is a shell variable empty? For no value write {key}=null")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if child is None:
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: `{parent}` is a single value, not a section")
        values = child
    try:
        values[last] = parse_yaml(text)
    except ValueError:
        values[last] = text
