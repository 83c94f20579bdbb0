"""A recipe: what one training run does. It is validated. The error for an unknown key names the nearest one.

The DeepSpeed JSON that `deepspeed` names holds only ZeRO, offload and communication. The trainer adds the
rest from the recipe.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.keys import keys_of, section_given_a_value, unknown_key
from llm2vec_ds.recipe.objectives import SECTIONS, ObjectiveConfig
from llm2vec_ds.recipe.renamed import with_names_of_today
from llm2vec_ds.recipe.sections import (
    AdapterConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MachineConfig,
    ModelConfig,
    OptimizerConfig,
    Place,
    Positive,
    Section,
)
from llm2vec_ds.storage.reading import in_words


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Monitors = Annotated[list[Literal["tensorboard", "wandb", "csv"]], BeforeValidator(_as_list)]


class Recipe(Section):
    """One training run: a stage, its model, its data. `recipe_class` adds the section of the stage."""

    stage: str
    """The objective that trains the model."""
    model: ModelConfig
    data: DataConfig
    output_dir: Place
    """The run's folder. It gets recipe.yaml, metrics.jsonl and, at the end, encoder/."""
    overwrite: bool = False
    """True starts again in an `output_dir` that holds a run."""
    resume: bool | Literal["force"] = False
    """True goes on from the newest valid checkpoint in `output_dir`, or starts if there is none. `force` goes
    on even if recipe, data or model have changed (docs/checkpoints.md)."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Fixes the order of the data, masking, dropout and the initial adapters."""
    max_steps: Positive = 1000
    """Number of optimizer steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training texts, instead of `max_steps`. It sets `max_steps` to this number times the
    number of whole batches of all sources, rounded up. null: `max_steps` counts."""
    deepspeed: Place | None = None
    """Path of a DeepSpeed JSON (see ds_configs/). null: one process, or plain data parallelism."""
    step_timeout_s: Annotated[float, Field(ge=0)] = 1800.0
    """A step, measurement or save that takes longer ends the run. The error names rank and step. 0: no
    limit."""
    deterministic: bool = False
    """True uses only GPU operations that give the same bits each time, which is slower. A resumed run then
    equals an uninterrupted one exactly. On a CPU this always holds, for the same number of threads."""
    held_out_every_steps: Annotated[int, Field(ge=0)] = 0
    """Measure on `data.held_out_path` after this many steps. 0: at the start and at the end only."""
    monitor: Monitors = []  # noqa: RUF012  (pydantic copies it)
    """Where metrics go in addition to metrics.jsonl: `tensorboard`, `wandb`, `csv`, or a list of them. Files
    are in `monitor/` of the run."""
    pooling: Literal["mean", "weighted_mean", "last", "eos", "bos"] = "mean"
    """How token vectors become the text's vector. `mean`: the mean of the text's tokens. `weighted_mean`: the
    mean weighted by position. `last`: the text's last token. `eos`: the end token, which is added to each
    text. `bos`: the first token of the sequence."""
    pooled_tokens: Literal["text", "all"] = "text"
    """Which tokens are pooled. `text`: those of the text alone. `all`: also instruction, template and special
    tokens, as vLLM and text-embeddings-inference do (docs/serving.md)."""
    adapter: AdapterConfig | None = AdapterConfig()
    """LoRA. `null` trains every weight of the trunk (full fine-tuning, docs/recipe.md)."""
    machine: MachineConfig = MachineConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = None
    """Tasks to measure during training. null: none."""

    @model_validator(mode="before")
    @classmethod
    def _only_the_own_stage_section(cls, values: Any) -> Any:
        """Removes empty sections of other stages, which old recipes have. Adds the stage's own section."""
        if not isinstance(values, dict) or values.get("stage") not in list(SECTIONS):
            return values
        stage = values["stage"]
        others = [name for name in SECTIONS if name != stage]
        if used := [name for name in others if values.get(name) is not None]:
            raise ValueError(f"section `{used[0]}` has no effect in stage `{stage}`: remove it")
        values = {key: value for key, value in values.items() if key not in others}
        values[stage] = values.get(stage) or {}
        data = values.get("data")
        if isinstance(data, dict):
            if SECTIONS[stage].reads_pairs:
                values["data"] = {**data, "pairs": data.get("pairs") or {}}
            elif data.get("pairs") is not None:
                raise ValueError(f"section `data.pairs` has no effect in stage `{stage}`: remove it")
        return values

    @model_validator(mode="after")
    def _pissa_has_its_own_start(self) -> Recipe:
        if self.adapter is not None and self.adapter.variant == "pissa" and not self.adapter.zero_init:
            raise ValueError("adapter.zero_init: false has no effect with variant: pissa: remove it")
        return self

    @model_validator(mode="after")
    def _only_adapters_train_over_nf4(self) -> Recipe:
        if self.model.quantization is None:
            return self
        if self.adapter is None:
            raise ValueError(
                "model.quantization: nf4 freezes all weights, so adapter: null leaves nothing to train: set "
                "adapter, or quantization: null"
            )
        if self.adapter.variant == "pissa":
            raise ValueError(
                "adapter.variant: pissa needs weights in 16 or 32 bits, not nf4: use lora, rslora or dora"
            )
        return self

    @model_validator(mode="after")
    def _pairs_are_not_split(self) -> Recipe:
        if self.data.pairs is not None and self.data.long_texts == "split":
            raise ValueError("data.long_texts: split would separate a query from its positive: use truncate")
        return self

    @model_validator(mode="after")
    def _suits_its_objective(self) -> Recipe:
        if mistake := self.objective.mistake_with(self.stage, self.batch, self.data):
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Recipe:
        if self.epochs is None and (mistake := self._warm_up_mistake()):
            raise ValueError(mistake)
        return self

    def _warm_up_mistake(self) -> str | None:
        warmup_steps = self.optimizer.warmup_steps
        if warmup_steps <= self.max_steps:
            return None
        return (
            f"optimizer.warmup_steps={warmup_steps} is more than max_steps={self.max_steps}, so the learning "
            "rate would never reach optimizer.lr: lower it"
        )

    def with_steps_of_epochs(self, steps_per_epoch: int) -> Recipe:
        """Returns the recipe with `max_steps` from `epochs`, or the recipe itself if `epochs` is null.

        Raises:
            UserError: the warm-up is longer than `max_steps`.
        """
        if self.epochs is None:
            return self
        # Rounded first, because 0.1 · 30 is 3.0000000000000004 in floating point.
        n_steps = math.ceil(round(self.epochs * steps_per_epoch, 6))
        recipe = self.model_copy(update={"max_steps": max(1, n_steps)})
        if mistake := recipe._warm_up_mistake():
            raise UserError(f"epochs={self.epochs:g}: {mistake}")
        return recipe

    @model_validator(mode="after")
    def _best_is_measured(self) -> Recipe:
        if self.checkpoint.best_by and self.data.held_out_path is None and self.evaluation is None:
            raise ValueError(
                f"checkpoint.best_by={self.checkpoint.best_by} needs held-out texts or an evaluation: set "
                "data.held_out_path or evaluation.tasks"
            )
        return self

    @property
    def objective(self) -> ObjectiveConfig:
        """The section of the stage."""
        section: ObjectiveConfig = getattr(self, self.stage)
        return section


def recipe_class(stage: str) -> type[Recipe]:
    """Returns the class `Recipe` with the section of a stage, under the stage's name.

    Raises:
        KeyError: no such stage.
    """
    return _with_section(stage, SECTIONS[stage])


@lru_cache
def _with_section(stage: str, section: type[ObjectiveConfig]) -> type[Recipe]:
    field: Any = (section, Field(default_factory=section))
    return create_model("Recipe", __base__=Recipe, **{stage: field})


def parse_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validates a recipe.

    Raises:
        UserError: one line with all mistakes.
    """
    values = with_names_of_today(values, source)
    stage = values.get("stage")
    if "stage" in values and not (isinstance(stage, str) and stage in SECTIONS):
        known = ", ".join(SECTIONS)
        raise UserError(f"{source}: `stage` must be one of {known} (got {stage!r})")
    parsed_by = recipe_class(stage) if stage is not None else Recipe
    try:
        return parsed_by.model_validate(values)
    except ValidationError as error:
        mistakes = "; ".join(_explain(mistake, parsed_by) for mistake in error.errors())
        raise UserError(f"{source}: {mistakes}") from None


def _explain(mistake: Any, parsed_by: type[Recipe]) -> str:
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return unknown_key([str(part) for part in mistake["loc"]], parsed_by)
    if mistake["type"] == "missing":
        return f"`{key}` is missing"
    if mistake["type"] == "model_type":
        return section_given_a_value([str(part) for part in mistake["loc"]], mistake["input"], parsed_by)
    message = in_words(mistake)
    return f"`{key}`: {message} (got {mistake['input']!r})" if key else message


def documented_keys() -> list[tuple[str, str, str]]:
    """Returns (dotted key, default or type, meaning) of every recipe key. Meanings are the docstrings."""
    rows = keys_of(Recipe)
    for stage, section in SECTIONS.items():
        rows += keys_of(section, f"{stage}.")
    return rows
