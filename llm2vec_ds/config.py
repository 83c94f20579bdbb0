"""Recipes: what one training run does. Typed, validated on load, unknown keys refused with the nearest.

Precedence: command-line `key=value` over recipe file over default. The DeepSpeed JSON that `deepspeed`
names holds ZeRO, offload and communication only; the trainer adds the rest from the recipe.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm2vec_ds.errors import UserError

Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, docstrings below fields are their documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The decoder-only LLM to start from, and how its trunk is run."""

    path: str
    """Folder or hub id of the model: the LLM itself, or the `encoder/` of an earlier stage."""
    causal: bool = False
    """True keeps the decoder's causal attention (a baseline); False makes it bidirectional."""
    attention: Literal["auto", "triton", "flash_attn", "varlen", "torch"] = "auto"
    """Attention backend, `auto`, `triton`, `flash_attn` (the package), `varlen` (torch's) or `torch`; `auto`
    picks by device and says what it picked and why (docs/kernels.md)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Trunk weights and activations. `auto`: bf16 on CUDA, fp32 on CPU (where bf16 is very slow)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What backward computes again instead of keeping it: `none`; `selective`, all but matrix products and
    attention (docs/performance.md); `full`, whole layers: least memory, about a third more time."""
    trust_remote_code: bool = False
    """Run code that lies beside the model, where it needs its own: read it first."""
    quantization: Literal["nf4"] | None = None
    """`nf4` holds the trunk's frozen linear weights in 4 bits (QLoRA, arXiv 2305.14314); only adapters
    train (docs/qlora.md)."""
    config_file: str | None = None
    """The model's config.json, for `plan` on a machine that lacks the model; null: beside the recipe."""


class AdapterConfig(Section):
    """LoRA (Hu et al., 2021, arXiv 2106.09685). Defaults are those of LLM2Vec."""

    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """`rslora` scales by alpha / √rank (arXiv 2312.03732), `dora` trains each row's length apart
    (arXiv 2402.09353), `pissa` starts from the weight's largest singular vectors (arXiv 2404.02948)."""
    rank: Positive = 16
    """Rank r of the update B·A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.05
    """Dropout on the input of A."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter; names as they end in the model, or all of the trunk."""
    zero_init: bool = True
    """B starts at zero, so that training starts at the model itself. False draws B at random: a test
    of gradients needs it, training does not."""


class PairsConfig(Section):
    """Examples of the supervised stage: a query, its positive, and hard negatives. Each file of
    `data.path` is a source of its own, named by its file name without endings."""

    query_column: str = "query"
    """Column that holds the query."""
    positive_column: str = "positive"
    """Column that holds the query's right document."""
    negative_column: str = "negative"
    """Column that holds a hard negative, or a list of them."""
    max_negatives: Annotated[int, Field(ge=0)] = 1
    """Hard negatives of an example that are used, from the first on; 0: the column is not read."""
    instructions: str | None = None
    """YAML file, `source: instruction for its queries`, or `source: {query: …, document: …, group: …}`;
    sources of one group share batches. null: `data.instruction` before every query."""
    sampling_temperature: Annotated[float, Field(gt=0)] = 1.0
    """A batch's source is drawn in proportion to (number of its batches)^(1/temperature): 1 is
    proportional, larger is more even."""


class DataConfig(Section):
    """Where the training texts come from."""

    path: str | list[str]
    """A file, several, or a folder of them: .txt (a text a line), .jsonl, .csv (these also .gz, .bz2, .xz) or
    .parquet; or a hub data set, `hub:owner/name`, `hub:owner/name:config@split`."""
    text_column: str = "text"
    """Column that holds the text, in .jsonl, .csv and .parquet."""
    max_tokens: Annotated[int, Field(ge=4)] = 128
    """A text's longest length in tokens, special tokens and instruction counted."""
    long_texts: Literal["truncate", "split"] = "truncate"
    """What becomes of a longer text: its head is kept, or it is cut into blocks of `max_tokens`."""
    instruction: str | None = None
    """Put before each text; attended, but not pooled."""
    template: str | None = None
    """What stands around instruction and text: a form such as `Instruct: {instruction} Text: {text}`, or
    `chat` for the tokenizer's own chat template; null: instruction, a blank, text."""
    held_out_path: str | list[str] | None = None
    """Texts that measure and never train, in the same format as `path`."""
    pairs: PairsConfig | None = None
    prepared_dir: str | None = None
    """Where tokenised texts are kept; null: `prepared/` in the cache folder of this user."""


class BatchConfig(Section):
    """How much goes into a step, and into one forward pass."""

    global_batch_size: Positive = 32
    """Texts a step, over all ranks. The result does not depend on how ranks share them."""
    max_tokens_per_micro_batch: Positive = 4096
    """Tokens of one forward pass on one rank; texts are packed into it without padding."""
    halve_if_out_of_memory: bool = False
    """Where the first step does not fit into the GPU's memory, all ranks start again with half of
    `max_tokens_per_micro_batch`, and so on down to `data.max_tokens`."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then constant or linear decay to zero."""

    name: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """`paged_adamw_8bit` (bitsandbytes, CUDA only) keeps its moments in 8 bits (arXiv 2110.02861), in
    memory that moves to the host when the GPU's is full."""
    lr: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam's decay of first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator floor."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The learning rate rises linearly over these steps."""
    schedule: Literal["constant", "linear"] = "linear"
    """After warm-up: stay, or fall linearly to zero at `max_steps`."""


class MntpConfig(Section):
    """Masked next token prediction (BehnamGhader et al., 2024, arXiv 2404.05961, section 2)."""

    mask_token: str = "_"
    """What replaces a masked token; must be one token of the tokenizer."""
    mask_rate: PositiveShare = 0.2
    """Share of a text's ordinary tokens that are predicted."""
    masking: Literal["bert", "all"] = "bert"
    """`bert`: of the predicted tokens 80 % become the mask token, 10 % a random one, 10 % stay.
    `all`: every one becomes the mask token."""
    attention_dropout: Share = 0.0
    """Dropout on attention weights."""
    head_chunk_tokens: Positive = 1024
    """Masked tokens whose logits are held at once."""


class ContrastiveConfig(Section):
    """InfoNCE over the global batch: all ranks' queries against all ranks' documents."""

    attention_dropout: Share = 0.0
    """Dropout on attention weights."""
    scale: Annotated[float, Field(gt=0)] = 20.0
    """Factor on cosine similarities, the inverse of the temperature."""
    learn_scale: bool = False
    """Trains the scale, starting at `scale` and held at 100 at most (CLIP, arXiv 2103.00020)."""
    symmetric: bool = False
    """Adds the loss of each positive against all ranks' queries; the mean of both is the loss."""
    matryoshka_dims: list[Positive] | None = None
    """The loss is the mean of one loss for each of these vector lengths (arXiv 2205.13147)."""
    false_negative_margin: Annotated[float, Field(ge=0)] | None = None
    """A document whose cosine with a query exceeds the positive's by more than this is no negative for
    it. null: only documents with the positive's very text are left out."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks see each other's documents: all at once, or one rank's at a time (memory flat in the
    number of ranks). The numbers are the same."""
    exchange_precision: Literal["fp32", "bf16"] = "fp32"
    """What documents are rounded to before ranks exchange them; gradients travel in fp32."""


class SimcseConfig(ContrastiveConfig):
    """Unsupervised SimCSE (Gao et al., 2021, arXiv 2104.08821): a text's two dropout passes agree."""

    attention_dropout: Share = 0.3
    """Dropout on attention weights: what makes the two passes differ (LLM2Vec: 0.3)."""


class SupervisedConfig(ContrastiveConfig):
    """Supervised contrastive learning (arXiv 2404.05961, section 4) on queries, positives and negatives."""

    scale: Annotated[float, Field(gt=0)] = 50.0
    """Factor on cosine similarities, the inverse of the temperature (LLM2Vec: 50)."""


class CheckpointConfig(Section):
    """What is kept so that nothing is lost (docs/checkpoints.md); `resume=true` goes on from it."""

    every_steps: Annotated[int, Field(ge=0)] = 100
    """Save this often, in optimizer steps; 0: only when asked to stop."""
    keep_last: Positive = 2
    """The newest checkpoints that are kept."""
    best_by: str | None = None
    """A held-out metric, e.g. `loss`: the checkpoint with the best value is kept too, and becomes the
    encoder at the end."""
    lowest_is_best: bool = True
    """Whether a lower value of `best_by` is better."""
    signals: list[Literal["USR1", "USR2", "TERM", "INT", "HUP"]] = ["USR1", "TERM"]
    """Signals that ask for a checkpoint at the step's end and exit code 75; so does a file `STOP` in
    `output_dir`."""


class WordsConfig(Section):
    """A word-level task."""

    train: str
    """A .conllu or CoNLL column file, or hub:owner/name@split."""
    test: str
    """The same, to measure on."""
    column: str = "upos"
    """Column of the labels."""
    max_sentences: Positive | None = None
    """Only the first of each file."""
    max_steps: Positive = 4000
    """Steps of the linear layer."""


class EvaluationConfig(Section):
    """Tasks that measure during training (docs/evaluation.md); results go to held_out.jsonl, and
    `checkpoint.best_by` may name one. Every rank measures all of it: keep it small."""

    tasks: list[str] = []
    """As `llm2vec-ds evaluate mteb --task` takes them, e.g. `sts:pairs.csv`, measured as `STS-pairs`."""
    words: WordsConfig | None = None
    """A word-level task, measured as `words_same_token` and `words_next_token`."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Measure this often; 0: at the start and at the end only."""


class MachineConfig(Section):
    """What a recipe is written for. `llm2vec-ds plan` tells whether it fits; training does not read it."""

    nodes: Positive = 1
    """Machines."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """GPUs of each; 0: one process on the CPU."""
    memory_gib: Annotated[float, Field(gt=0)] = 80.0
    """Memory of one GPU, or of the host for a CPU."""
    interconnect_gbps: Annotated[float, Field(gt=0)] | None = None
    """Gigabits a second that one GPU sends to others; null: 200 between nodes, 256 inside one."""
    tflops: Annotated[float, Field(gt=0)] = 312.0
    """Dense bf16 matrix products of one GPU, 10¹² operations a second, by its data sheet."""


STAGES = ("mntp", "simcse", "supervised")


class Recipe(Section):
    """One training run: a stage, its model, its data."""

    stage: Literal["mntp", "simcse", "supervised"]
    """Which objective trains the model."""
    model: ModelConfig
    data: DataConfig
    output_dir: str
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
    deepspeed: str | None = None
    """Path of a DeepSpeed JSON (see ds_configs/); null: one process or plain data parallelism."""
    step_timeout_s: Annotated[float, Field(ge=0)] = 1800.0
    """A step, measurement or save that takes longer ends the run with a line that names rank and step;
    0: wait for ever."""
    deterministic: bool = False
    """On a GPU: only operations that give the same bits each time, so that a resumed run equals an
    undisturbed one exactly; slower. On a CPU they always do, the number of threads being the same."""
    held_out_every_steps: Annotated[int, Field(ge=0)] = 0
    """Measure on `data.held_out_path` this often; 0: at the start and at the end only."""
    monitor: list[Literal["tensorboard", "wandb", "csv"]] = []
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


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe file, applies `key=value` overrides (dotted keys), validates.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown or a value is invalid; or it has
            several stages and none is named.
    """
    recipes = load_stages(path, overrides)
    if len(recipes) > 1:
        names = ", ".join(recipe.stage for recipe in recipes)
        raise UserError(f"recipe {path} has the stages {names}: name one, e.g. stage={recipes[0].stage}")
    return recipes[0]


def load_stages(path: str | Path, overrides: list[str] | None = None) -> list[Recipe]:
    """The recipes of a file, in their order: one, or one for each key of its `stages`.

    A stage's keys lie over those beside `stages`. Each writes to a folder of its name in `output_dir`, and
    starts from the `encoder/` of the one before unless it says `model.path`. `stage=NAME` picks one.

    Raises:
        UserError: as `load_recipe`.
    """
    values, given = _read_yaml(Path(path)), overrides or []
    if "stages" not in values:
        for override in given:
            apply_override(values, override)
        return [parse_recipe(values, source=str(path))]
    stages = values.pop("stages")
    if not isinstance(stages, dict) or not stages or set(stages) - set(STAGES):
        raise UserError(f"recipe {path}: `stages` must have keys out of {', '.join(STAGES)}")
    chosen = [o.partition("=")[2] for o in given if o.startswith("stage=")]
    recipes: list[Recipe] = []
    for name, own in stages.items():
        merged = _stage_values(values, name, own or {}, [recipe.stage for recipe in recipes], given)
        recipes.append(parse_recipe(merged, source=f"{path}, stage {name}"))
    if chosen and chosen[-1] not in stages:
        raise UserError(f"recipe {path} has no stage {chosen[-1]!r}: it has {', '.join(stages)}")
    return [recipe for recipe in recipes if not chosen or recipe.stage == chosen[-1]]


def _stage_values(
    common: dict[str, Any], name: str, own: dict[str, Any], before: list[str], overrides: list[str]
) -> dict[str, Any]:
    values = _laid_over(common, {"stage": name})
    other_sections = tuple(f"{stage}." for stage in STAGES if stage != name)
    applied = [o for o in overrides if not o.startswith(("stage=", *other_sections))]
    if before:  # the first stage's model, unless a stage names its own
        applied = [override for override in applied if not override.startswith("model.path=")]
    for override in [o for o in applied if o.startswith("output_dir=")]:
        apply_override(values, override)
    root = values.get("output_dir")
    values = _laid_over(values, {"output_dir": f"{root}/{name}"} if root else {})
    if before:
        values = _laid_over(values, {"model": {"path": f"{root}/{before[-1]}/encoder"}})
    values = _laid_over(values, own)
    for override in [o for o in applied if not o.startswith("output_dir=")]:
        apply_override(values, override)
    return values


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A new mapping: `above` where it has a key, section by section."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in below.items()}
    for key, value in above.items():
        old = result.get(key)
        result[key] = _laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"recipe {path} not found: give the path of a YAML file, e.g. recipes/smoke_mntp.yaml"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a YAML mapping of keys to values")
    return values


def parse_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validates; all mistakes in one UserError line."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = "; ".join(_explain(mistake) for mistake in error.errors())
        raise UserError(f"{source}: {mistakes}") from None


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe, every default filled in, so that the run can be repeated."""
    values = recipe.model_dump(mode="json")
    values = {k: v for k, v in values.items() if k not in STAGES or v is not None}
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Puts one `key=value` (dotted key, YAML value) into `values`.

    Raises:
        UserError: no such form, or a key below a single value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value, e.g. optimizer.lr=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if child is None:
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: `{parent}` is a single value, not a section")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[last] = text


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
