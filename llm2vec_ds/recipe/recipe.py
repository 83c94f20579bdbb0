"""A recipe: what one training run does. Validated, unknown keys refused with the nearest.

The DeepSpeed JSON that `deepspeed` names holds ZeRO, offload and communication only; the trainer adds the
rest from the recipe.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.sections import (
    AdapterConfig,
    BatchConfig,
    CheckpointConfig,
    ContrastiveConfig,
    DataConfig,
    EvaluationConfig,
    MachineConfig,
    MntpConfig,
    ModelConfig,
    OptimizerConfig,
    Place,
    Positive,
    Section,
    SimcseConfig,
    SupervisedConfig,
)

STAGES = ("mntp", "simcse", "supervised")


class Recipe(Section):
    """One training run: a stage, its model, its data."""

    stage: Literal["mntp", "simcse", "supervised"]
    """Which objective trains the model."""
    model: ModelConfig
    data: DataConfig
    output_dir: Place
    """The run's folder: recipe.yaml, metrics.jsonl and, at the end, encoder/."""
    overwrite: bool = False
    """Start again in an `output_dir` that holds a run."""
    resume: bool | Literal["force"] = False
    """Go on from the newest valid checkpoint in `output_dir`; start there if there is none. `force`: even
    where recipe, data or model have changed since."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Fixes data order, masking, dropout and adapter initialisation."""
    max_steps: Positive = 1000
    """Optimizer steps."""
    deepspeed: Place | None = None
    """Path of a DeepSpeed JSON (see ds_configs/); null: one process or plain data parallelism."""
    step_timeout_s: Annotated[float, Field(ge=0)] = 1800.0
    """A step, measurement or save that takes longer ends the run with a line that names rank and step;
    0: wait for ever."""
    deterministic: bool = False
    """On a GPU: only operations that give the same bits each time, so that a resumed run equals an
    undisturbed one exactly; slower. On a CPU they always do, the number of threads being the same."""
    held_out_every_steps: Annotated[int, Field(ge=0)] = 0
    """Measure on `data.held_out_path` this often; 0: at the start and at the end only."""
    monitor: list[Literal["tensorboard", "wandb", "csv"]] = []  # noqa: RUF012  (pydantic copies it)
    """Where metrics go beside metrics.jsonl, by DeepSpeed's monitor; files under `monitor/` of the run."""
    pooling: Literal["mean", "weighted_mean", "last", "eos", "bos"] = "mean"
    """How token vectors become the text's vector: mean of its tokens (weighted: by position), its last
    token, or the end or beginning of the sequence (`eos` is added to each text)."""
    pooled_tokens: Literal["text", "all"] = "text"
    """What pooling sees: the text alone, or also instruction, template and special tokens, as vLLM and
    text-embeddings-inference pool (see docs/serving.md)."""
    adapter: AdapterConfig | None = AdapterConfig()
    """LoRA; null trains every weight of the trunk."""
    machine: MachineConfig = MachineConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = None
    """Tasks measured during training; null: none."""
    mntp: MntpConfig | None = None
    simcse: SimcseConfig | None = None
    supervised: SupervisedConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_the_own_stage_section(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        stage = values.get("stage")
        if stage not in STAGES:
            return values
        others = [name for name in STAGES if name != stage and values.get(name) is not None]
        if others:
            raise ValueError(f"section `{others[0]}` has no effect in stage `{stage}`: remove it")
        values = {**values, stage: values.get(stage) or {}}
        data = values.get("data")
        if isinstance(data, dict):
            if stage == "supervised":
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
                "model.quantization: nf4 holds frozen weights only: set adapter, or quantization: null"
            )
        if self.adapter.variant == "pissa":
            raise ValueError(
                "adapter.variant: pissa takes weights of 16 or 32 bits apart, nf4 has none: use lora, rslora "
                "or dora"
            )
        return self

    @model_validator(mode="after")
    def _pairs_are_not_split(self) -> Recipe:
        if self.stage == "supervised" and self.data.long_texts == "split":
            raise ValueError("data.long_texts: split would part a query from its positive: use truncate")
        return self

    @model_validator(mode="after")
    def _a_batch_has_negatives(self) -> Recipe:
        if self.batch.global_batch_size > 1 or self.contrastive is None:
            return self
        if self.data.pairs is None or self.data.pairs.max_negatives == 0:
            raise ValueError(
                f"batch.global_batch_size=1 leaves the {self.stage} loss without negatives, so that it is "
                "always 0: raise it"
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Recipe:
        if self.checkpoint.best_by and self.data.held_out_path is None and self.evaluation is None:
            raise ValueError(
                f"checkpoint.best_by={self.checkpoint.best_by} needs held-out texts or an evaluation: set "
                "data.held_out_path or evaluation.tasks"
            )
        return self

    @property
    def contrastive(self) -> ContrastiveConfig | None:
        """The settings of a contrastive stage; None for MNTP."""
        return self.simcse or self.supervised


def parse_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validates; all mistakes in one UserError line."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = "; ".join(_explain(mistake) for mistake in error.errors())
        raise UserError(f"{source}: {mistakes}") from None


def _explain(mistake: Any) -> str:
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return _unknown_key(key, [str(part) for part in mistake["loc"]])
    if mistake["type"] == "missing":
        return f"`{key}` is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"`{key}`: {message} (got {mistake['input']!r})" if key else message


def _unknown_key(key: str, location: list[str]) -> str:
    section = _section_at(location[:-1])
    names = list(section.model_fields) if section else []
    prefix = key.rpartition(".")[0]
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.0)
    if not near:
        return f"unknown key `{key}`"
    suggestion = f"{prefix}.{near[0]}" if prefix else near[0]
    return f"unknown key `{key}`: did you mean `{suggestion}`?"


def _section_at(location: list[str], start: type[Section] | None = None) -> type[Section] | None:
    section = start or Recipe
    for name in location:
        field = section.model_fields.get(name)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
        if not found:
            return None
        section = found[0]
    return section


def documented_keys(section: type[Section] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default or type, meaning) of every recipe key, from the docstrings of the fields."""
    rows = []
    for name, field in section.model_fields.items():
        inner = _section_at(location=[name], start=section)
        if inner is not None:
            rows += documented_keys(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.default)
        rows.append((prefix + name, default, " ".join((field.description or "").split())))
    return rows
