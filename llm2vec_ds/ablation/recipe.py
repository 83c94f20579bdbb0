"""The recipe of `llm2vec-ds ablate`: the variants, how they are trained, and what they are measured on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.files import apply_override, laid_over, read_recipe_file
from llm2vec_ds.recipe.objectives import SECTIONS
from llm2vec_ds.recipe.sections import Place, Section, WordsConfig
from llm2vec_ds.storage.reading import explain


class EvaluateConfig(Section):
    """What every variant is measured on."""

    sentences: list[str] = Field(default_factory=list)
    """Tasks as `llm2vec-ds evaluate mteb --task` takes them."""
    words: dict[str, WordsConfig] = Field(default_factory=dict)
    """Word-level tasks by name."""


OF_THE_ABLATION = ("output_dir", "seed", "overwrite", "resume")
"""Keys of a run that the ablation sets itself."""


def _stage(values: Any) -> Any:
    """Makes a mapping of a stage and of its sections that have none. Refuses what no stage can have."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("write the keys of its recipe below it")
    if own := [key for key in OF_THE_ABLATION if key in values]:
        raise ValueError(f"the ablation itself sets `{own[0]}`: leave it out")
    for key in ("data", "model", *SECTIONS):
        if not isinstance(values.get(key, {}), dict | None):
            raise ValueError(f"`{key}` has keys of its own: write `{key}: {{…}}`")
    return {key: {} if value is None and key in ("data", "model") else value for key, value in values.items()}


Stage = Annotated[dict[str, Any], BeforeValidator(_stage)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class AblationRecipe(Section):
    """The paper's comparison of its steps, on any model and data."""

    model: Place | None = None
    """Folder or hub id of the LLM. null: the demo's SmolLM2-135M-Instruct."""
    text: Place | None = None
    """Plain text that gives paragraphs (MNTP) and sentences (SimCSE). null: the demo's text. A stage with its
    own `data.path` uses that instead."""
    variants: list[str]
    """`uni` (causal) or `bi`, followed by stages, such as `bi+mntp+simcse`."""
    seeds: list[Seed] = Field(default_factory=lambda: [42], min_length=1)
    """Each variant is trained once with each seed."""
    stages: dict[str, Stage] = Field(default_factory=dict)
    """The recipe of each stage, without model, output and seed. A stage is named after what it trains. With
    the key `stage` it takes another name, such as `simcse_slow: {stage: simcse, max_steps: 500}`."""
    budgets: dict[str, dict[str, Stage]] = Field(default_factory=dict)
    """The changes that each budget makes to the stages, by the budget's name."""
    evaluate: EvaluateConfig
    """What every variant is measured on."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for name, values in self.stages.items():
            self._check_stage(name, values)
        known = {*SECTIONS, *self.stages}
        for budget, changes in self.budgets.items():
            if unknown := [name for name in changes if name not in known]:
                raise ValueError(f"budget {budget!r} changes stage {unknown[0]!r}, which is not in `stages`")
            if fixed := [name for name, values in changes.items() if "stage" in values]:
                raise ValueError(f"budget {budget!r} cannot change `stage` of {fixed[0]!r}: use `stages`")
        if not self.evaluate.sentences and not self.evaluate.words:
            raise ValueError("`evaluate` measures nothing: name `sentences` or `words`")
        for variant in self.variants:
            attention, *stages = variant.split("+")
            if attention not in ("uni", "bi") or not set(stages) <= known:
                raise ValueError(f"variant {variant!r}: write uni or bi, then stages, such as bi+mntp+simcse")
        return self

    @staticmethod
    def _check_stage(name: str, values: dict[str, Any]) -> None:
        trains = str(values.get("stage", name))
        if trains not in SECTIONS:
            raise ValueError(
                f"stage {name!r} is unknown: choose one of {', '.join(SECTIONS)}, or name one as its `stage`"
            )
        if name in SECTIONS and trains != name:
            raise ValueError(f"stage {name!r} cannot have `stage: {trains}`: give it another name")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"stage {name!r}: a name has letters, digits, _ and -")

    @field_validator("variants", "seeds")
    @classmethod
    def _are_distinct(cls, given: list[Any], info: ValidationInfo) -> list[Any]:
        if len(set(given)) < len(given) or not given:
            raise ValueError(f"give at least one of the {info.field_name}, and each only once")
        return given

    def trains(self, stage: str) -> str:
        """Returns what a stage trains, such as simcse for `simcse_slow`."""
        return str(self.stages.get(stage, {}).get("stage", stage))

    def stage_values(self, stage: str, budget: str | None) -> dict[str, Any]:
        """Returns the stage's recipe with the changes of the budget, without the key `stage`."""
        values = {key: value for key, value in self.stages.get(stage, {}).items() if key != "stage"}
        changes = self.budgets[budget].get(stage, {}) if budget else {}
        return laid_over(values, changes)


def runs_of(variants: list[str]) -> Iterator[str]:
    """Yields every training run that the variants need, such as `bi+mntp`, each after the one it extends."""
    seen: dict[str, None] = {}
    for variant in variants:
        parts = variant.split("+")
        seen.update(dict.fromkeys("+".join(parts[:n]) for n in range(2, len(parts) + 1)))
    yield from seen


def load_ablation(path: Path, budget: str | None, overrides: list[str] | None = None) -> AblationRecipe:
    """Reads the file, applies `key=value` overrides and validates it.

    Raises:
        UserError: there is no such file, it is no mapping, a key or budget is unknown, or a value is invalid.
    """
    values = read_recipe_file(path)
    for override in overrides or []:
        apply_override(values, override)
    try:
        recipe = AblationRecipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(map(explain, error.errors()))}") from None
    if budget is not None and budget not in recipe.budgets:
        known = ", ".join(recipe.budgets) or "none"
        raise UserError(f"--budget {budget!r} is not in {path}: it has {known}")
    return recipe
