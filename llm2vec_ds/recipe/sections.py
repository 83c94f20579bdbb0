"""Sections of a recipe. Typed; what a docstring says below a field is its documentation."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from llm2vec_ds.process.preemption import DEFAULT_SIGNALS, Signal

Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file, a folder or a hub id; `~` is the home folder."""


def _word(value: object) -> object:
    """YAML reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and so are infinity and NaN; docstrings below fields are
    their documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The decoder-only LLM to start from, and how its trunk is run."""

    path: Place
    """Folder or hub id of the model: the LLM itself, or the run of an earlier stage (or its `encoder/`)."""
    causal: bool = False
    """False makes attention bidirectional. True keeps the decoder's causal attention, for a baseline."""
    attention: Literal["auto", "triton", "flash_attn", "varlen", "torch"] = "auto"
    """The attention backend: `auto`, `triton`, `flash_attn` (the package), `varlen` (torch's) or `torch`.
    `auto` picks by device, and the log says what and why (docs/kernels.md)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of weights and activations. `auto`: bf16 on CUDA, fp32 on a CPU, where bf16 is very slow."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What backward computes again. `none`: nothing. `selective`: norms and gated units; results of matrix
    products and attention are kept (docs/performance.md). `full`: whole layers, which takes least memory
    and about a third more time."""
    fused_layers: Literal["auto", "off"] = "auto"
    """`auto` runs norms, rotary embeddings and gated units as one operation each, if their code is known
    (docs/kernels.md). `off` leaves them to transformers."""
    cuda_graphs: Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)] = "auto"
    """CUDA graphs record the trunk's passes once for each of a few lengths and replay them, so that the GPU
    does not wait for Python. `auto` records where it can and it pays; elsewhere the log says why not. `on`
    refuses where it cannot (docs/performance.md)."""
    trust_remote_code: bool = False
    """True runs the model's own code, if it needs some. Read that code first. Only `train`, `prepare` and
    `plan` run it; the other commands refuse the encoder of such a run (docs/security.md)."""
    quantization: Literal["nf4"] | None = None
    """`nf4` holds the trunk's frozen linear weights in 4 bits (QLoRA, arXiv 2305.14314). Only adapters
    train (docs/qlora.md)."""
    config_file: Place | None = None
    """The model's config.json, for `plan` on a machine without the model. null: the one beside the recipe."""


class AdapterConfig(Section):
    """LoRA (Hu et al., 2021, arXiv 2106.09685). Defaults are those of LLM2Vec."""

    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """`lora` is plain LoRA. `rslora` scales by alpha / √rank (arXiv 2312.03732). `dora` trains each row's
    length apart (arXiv 2402.09353). `pissa` starts from the weight's largest singular vectors
    (arXiv 2404.02948)."""
    rank: Positive = 16
    """Rank r of the update B·A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.05
    """Dropout on the input of A."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get an adapter: the ends of their names, or all of the trunk."""
    zero_init: bool = True
    """True: B starts at zero, so training starts at the model itself. False draws B at random, which a test
    of gradients needs and training does not."""


class PairsConfig(Section):
    """Examples of the supervised stage: a query, its positive, and hard negatives. Each file of
    `data.path` is a source of its own, named by its file name without endings."""

    query_column: str = "query"
    """Column with the query."""
    positive_column: str = "positive"
    """Column with the query's right document, or with a list of them. Each gives an example."""
    positives: Literal["all", "one_per_epoch"] = "all"
    """`all`: every positive gives an example. `one_per_epoch`: if a query has several positives, in a list or
    in several rows, each epoch draws one of them. So no query counts for more than another."""
    negative_column: str = "negative"
    """Column with a hard negative, or with a list of them. Or several columns with numbers after this name:
    `negative_1`, `negative_2` …"""
    max_negatives: Annotated[int, Field(ge=0)] = 1
    """How many hard negatives of an example are used, from the first on. 0: the column is not read."""
    instructions: Place | None = None
    """A YAML file: `source: instruction for its queries`, or `source: {query: …, document: …, group: …}`.
    Sources of one group share batches. null: `data.instruction` goes before every query."""
    sampling_temperature: Annotated[float, Field(gt=0)] = 1.0
    """A batch draws its source in proportion to (number of its batches)^(1/temperature). 1 is proportional,
    and larger is more even."""


class DataConfig(Section):
    """Where the training texts come from."""

    path: Place | list[Place]
    """A file, a list of files, or a folder: .txt (a text a line), .jsonl, .json, .csv, .tsv (these also .gz,
    .bz2, .xz) or .parquet. Or a data set of the hub: `hub:owner/name`, `hub:owner/name:config@split`
    (docs/data.md)."""
    text_column: str = "text"
    """Column with the text, in all formats but .txt."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """For a row that breaks its format, or has no text where one should be: `raise` stops and names its line,
    `skip` leaves it out and counts it."""
    max_tokens: Annotated[int, Field(ge=4)] = 128
    """The longest text in tokens. Special tokens and the instruction count."""
    long_texts: Literal["truncate", "split"] = "truncate"
    """For a longer text: `truncate` keeps its head, `split` cuts it into blocks of `max_tokens`."""
    instruction: str | None = None
    """Goes before each text. The model attends to it, but it is not pooled."""
    template: str | None = None
    """What stands around instruction and text: a form such as `Instruct: {instruction} Text: {text}`, or
    `chat` for the tokenizer's own chat template. null: instruction, a blank, text."""
    held_out_path: Place | list[Place] | None = None
    """Texts to measure on, which never train, in the same format as `path`."""
    pairs: PairsConfig | None = None
    prepared_dir: Place | None = None
    """Where tokenised texts are kept. null: `prepared/` in your cache folder."""


class BatchConfig(Section):
    """How much goes into a step, and into one forward pass."""

    global_batch_size: Positive = 32
    """Texts of a step, over all ranks. The result does not depend on how ranks share them."""
    micro_batch_tokens: Positive = 4096
    """Tokens of one forward pass on one rank. Texts are packed into it without padding."""
    halve_if_out_of_memory: bool = False
    """True: if the first step does not fit into memory, all ranks start again with half of
    `micro_batch_tokens`, and so on down to `data.max_tokens`."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then a constant or falling rate."""

    name: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """`paged_adamw_8bit` (bitsandbytes, CUDA only) keeps its moments in 8 bits (arXiv 2110.02861). Their
    memory moves to the host when the GPU's is full."""
    lr: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam's decay of the first and the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's smallest denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm. 0 leaves them as they are."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The learning rate rises linearly over these steps."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the trainable weights, such as 0.999. Measurements during training and the
    encoder take the average (docs/merging.md). null: no average."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """After the warm-up: `constant` stays. `linear` and `cosine` (arXiv 1608.03983) fall to zero at
    `max_steps`. `wsd` stays and falls linearly at the end (warm-up, stable, decay: arXiv 2404.06395)."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """For `wsd`: the share of `max_steps` in which the rate falls."""


class CheckpointConfig(Section):
    """What is kept so that nothing is lost (docs/checkpoints.md); `resume=true` goes on from it."""

    every_steps: Annotated[int, Field(ge=0)] = 100
    """Save after this many optimizer steps. 0: only when asked to stop."""
    keep_last: Positive = 2
    """How many of the newest checkpoints are kept."""
    best_by: str | None = None
    """A held-out metric such as `loss`. The checkpoint with the best value is kept too, and becomes the
    encoder at the end."""
    lowest_is_best: bool = True
    """Whether a lower value of `best_by` is better."""
    signals: list[Signal] = DEFAULT_SIGNALS
    """Signals that ask the run to save at the step's end and stop with exit code 75. Ctrl-C (INT), a closed
    terminal (HUP) and a file `STOP` in `output_dir` do so too."""


class WordsConfig(Section):
    """A word-level task."""

    train: Place
    """A .conllu or CoNLL column file, or hub:owner/name@split."""
    test: Place
    """The same, to measure on."""
    column: str = "upos"
    """Column of the labels."""
    max_sentences: Positive | None = None
    """Take only so many sentences of each file, from the first on. null: all."""
    max_steps: Positive = 4000
    """Steps of the linear layer."""


class EvaluationConfig(Section):
    """Tasks that measure during training (docs/evaluation.md); results go to held_out.jsonl, and
    `checkpoint.best_by` may name one. Every rank measures all of it: keep it small."""

    tasks: list[str] = []
    """Tasks as `llm2vec-ds evaluate mteb --task` takes them. `sts:pairs.csv` is measured as `STS-pairs`."""
    exclude_self: bool = False
    """For `retrieval:FOLDER`: a document with the query's own id is not ranked."""
    words: WordsConfig | None = None
    """A word-level task, measured as `words_same_token` and `words_next_token`."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Measure after this many steps. 0: at the start and at the end only."""


class MachineConfig(Section):
    """What a recipe is written for. `llm2vec-ds plan` tells whether it fits; training does not read it."""

    nodes: Positive = 1
    """Number of machines."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """GPUs of each machine. 0: one process on the CPU."""
    memory_gib: Annotated[float, Field(gt=0)] = 80.0
    """Memory of one GPU, or of the host if there is no GPU."""
    interconnect_gbps: Annotated[float, Field(gt=0)] | None = None
    """Gigabits a second that one GPU sends to others. null: 200 between nodes, 256 inside one."""
    tflops: Annotated[float, Field(gt=0)] = 312.0
    """Speed of one GPU's dense bf16 matrix products by its data sheet, in 10¹² operations a second."""
