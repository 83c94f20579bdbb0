"""The sections of a recipe. The docstring below a field is the key's documentation."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from llm2vec_ds.process.preemption import DEFAULT_SIGNALS, Signal

Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file, a folder or a hub id. `~` is the home folder."""


def _word(value: object) -> object:
    """Undoes what YAML does: it reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    """A part of a recipe. Unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The decoder-only LLM to start from, and how its trunk runs."""

    path: Place
    """Folder or hub id of the model: the LLM itself, or the run of an earlier stage (or its `encoder/`)."""
    causal: bool = False
    """False makes attention bidirectional. True keeps the decoder's causal attention, for a baseline."""
    attention: Literal["auto", "triton", "flash_attn", "varlen", "torch"] = "auto"
    """The attention backend: `auto`, `triton`, `flash_attn` (the package), `varlen` (torch's) or `torch`.
    `auto` picks by device, and the log says which and why (docs/kernels.md)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of weights and activations. `auto`: bf16 on CUDA, fp32 on a CPU, where bf16 is often slow."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What the backward pass computes again. `none`: nothing. `selective`: norms and gated units, while
    results of matrix products and attention stay in memory (docs/performance.md). `full`: whole layers, which
    needs the least memory and takes about a third more time."""
    fused_layers: Literal["auto", "off"] = "auto"
    """`auto` runs norms, rotary embeddings and gated units as one operation each, if their code is known
    (docs/kernels.md). `off` leaves them to transformers."""
    cuda_graphs: Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)] = "auto"
    """CUDA graphs record the trunk's passes once for each of a few lengths and replay them, so that the GPU
    does not wait for Python. `auto` records if it is possible and pays off. Otherwise the log says why not.
    `on` ends with an error if it is not possible (docs/performance.md)."""
    trust_remote_code: bool = False
    """True runs the model's own code, if it needs some. Read that code first. Only `train`, `prepare` and
    `plan` run it. The other commands refuse the encoder of such a run (docs/security.md)."""
    quantization: Literal["nf4"] | None = None
    """`nf4` holds the trunk's frozen linear weights in 4 bits (QLoRA, arXiv 2305.14314). Only adapters
    train (docs/qlora.md)."""
    config_file: Place | None = None
    """The model's config.json, for `plan` on a machine without the model. null: the one beside the recipe."""


class AdapterConfig(Section):
    """LoRA (Hu et al., 2021, arXiv 2106.09685). The defaults are those of LLM2Vec."""

    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """`lora` is plain LoRA. `rslora` scales by alpha / √rank (arXiv 2312.03732). `dora` trains the length of
    each row separately (arXiv 2402.09353). `pissa` starts from the weight's largest singular vectors
    (arXiv 2404.02948)."""
    rank: Positive = 16
    """Rank r of the update B·A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.05
    """Dropout on the input of A."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get an adapter: `all-linear` for all of the trunk, or a list of how their names
    end."""
    zero_init: bool = True
    """True: B starts at zero, so training starts at the model itself. False draws B at random. A test of
    gradients needs this, training does not."""


class PairsConfig(Section):
    """Examples of a query, its positive, and hard negatives. Each file of `data.path` is a source of its own.
    Its name is the file name without endings."""

    query_column: str = "query"
    """Column with the query."""
    positive_column: str = "positive"
    """Column with the document that answers the query, or with a list of them. Each gives an example."""
    positives: Literal["all", "one_per_epoch"] = "all"
    """`all`: every positive gives an example. `one_per_epoch`: if a query has several positives, in a list or
    in several rows, each epoch draws one of them. So all queries count equally."""
    negative_column: str = "negative"
    """Column with a hard negative, or with a list of them. Or several columns with numbers after this name:
    `negative_1`, `negative_2` …"""
    max_negatives: Annotated[int, Field(ge=0)] = 1
    """How many hard negatives of an example are used: the first ones. 0: the column is not read."""
    instructions: Place | None = None
    """A YAML file: `source: instruction for its queries`, or `source: {query: …, document: …, group: …}`.
    Sources of one group share batches. null: `data.instruction` goes before every query."""
    sampling_temperature: Annotated[float, Field(gt=0)] = 1.0
    """A source is drawn for each batch, in proportion to (number of its batches)^(1/temperature). 1 is
    proportional to size. A larger value is more even."""


class DataConfig(Section):
    """Where the training texts come from."""

    path: Place | list[Place]
    """A file, a list of files, or a folder: .txt (one text per line), .jsonl, .json, .csv, .tsv (these also
    .gz, .bz2, .xz) or .parquet. Or a data set of the hub: `hub:owner/name`, `hub:owner/name:config@split`
    (docs/data.md)."""
    text_column: str = "text"
    """Column with the text, in all formats but .txt."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """What to do with a row that breaks its format or lacks a text. `raise` stops and names its line. `skip`
    leaves it out and counts it."""
    max_texts: Positive | None = None
    """Read only the first N texts, or the first N pairs of each source. This holds for held-out data too.
    null: all."""
    max_tokens: Annotated[int, Field(ge=4)] = 128
    """The longest text in tokens. Special tokens and the instruction count."""
    long_texts: Literal["truncate", "split"] = "truncate"
    """What to do with a longer text. `truncate` keeps its beginning. `split` cuts it into blocks of
    `max_tokens`."""
    instruction: str | None = None
    """Goes before each text. The model attends to it, but it is not pooled."""
    template: str | None = None
    """How instruction and text are put together: a form such as `Instruct: {instruction} Text: {text}`, or
    `chat` for the tokenizer's own chat template. null: instruction, a space, text."""
    held_out_path: Place | list[Place] | None = None
    """Texts to measure on, in the same format as `path`. Keep them out of `path`. `simcse` has no held-out
    loss."""
    pairs: PairsConfig | None = None
    prepared_dir: Place | None = None
    """Where tokenised texts are kept. null: `prepared/` in your cache folder."""


class BatchConfig(Section):
    """The size of a step, and of one forward pass."""

    global_batch_size: Positive = 32
    """Texts of one step, over all ranks. The result does not depend on how ranks share them."""
    micro_batch_tokens: Positive = 4096
    """Most tokens of one forward pass on one rank. Texts are packed without padding."""
    halve_if_out_of_memory: bool = False
    """True: if the first step does not fit into memory, all ranks start again with half of
    `micro_batch_tokens`. This repeats down to `data.max_tokens`."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then a constant or falling learning rate."""

    name: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """`paged_adamw_8bit` (bitsandbytes, CUDA only) keeps its moments in 8 bits (arXiv 2110.02861). Their
    memory moves to the host when the GPU's is full."""
    lr: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam's decay rates of the first and the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """If the global norm of the gradients is larger, they are scaled down to it. 0: no clipping."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The learning rate rises linearly over these steps."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the trainable weights, such as 0.999. Measurements during training and the
    final encoder use the average (docs/merging.md). null: no average."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """The learning rate after the warm-up. `constant` stays. `linear` and `cosine` (arXiv 1608.03983) fall to
    zero at `max_steps`. `wsd` stays, and falls linearly at the end (warm-up, stable, decay: arXiv
    2404.06395)."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """For `wsd`: the share of `max_steps` in which the learning rate falls."""


class CheckpointConfig(Section):
    """Which checkpoints are saved and kept (docs/checkpoints.md). `resume=true` goes on from them."""

    every_steps: Annotated[int, Field(ge=0)] = 100
    """Save after this many optimizer steps. 0: only when asked to stop."""
    keep_last: Positive = 2
    """How many of the newest checkpoints are kept."""
    best_by: str | None = None
    """A held-out metric such as `loss`. The checkpoint with the best value is also kept, and becomes the
    encoder at the end."""
    lowest_is_best: bool = True
    """Whether a lower value of `best_by` is better."""
    signals: list[Signal] = DEFAULT_SIGNALS
    """Signals that ask the run to save at the end of the step and to stop with exit code 75. Ctrl-C (INT), a
    closed terminal (HUP) and a file `STOP` in `output_dir` do the same."""


class WordsConfig(Section):
    """A word-level task."""

    train: Place
    """Data to train on: a .conllu file, a CoNLL column file, or hub:owner/name@split."""
    test: Place
    """Data to measure on, in the same formats."""
    column: str = "upos"
    """Column of the labels."""
    max_sentences: Positive | None = None
    """Read only this many sentences of each file, from the start. null: all."""
    max_steps: Positive = 4000
    """Training steps of the linear layer."""


class EvaluationConfig(Section):
    """Tasks to measure during training (docs/evaluation.md). Results go to held_out.jsonl, and
    `checkpoint.best_by` may name one. Every rank measures all tasks, so keep them small."""

    tasks: list[str] = []
    """Tasks as `llm2vec-ds evaluate mteb --task` takes them. `sts:pairs.csv` is measured as `STS-pairs`."""
    exclude_self: bool = False
    """For `retrieval:FOLDER`: a document with the query's own id is not ranked."""
    words: WordsConfig | None = None
    """A word-level task. Its results are `words_same_token` and `words_next_token`."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Measure after this many steps. 0: at the start and at the end only."""


class MachineConfig(Section):
    """The machine that a recipe is written for. `llm2vec-ds plan` reads it, training does not."""

    nodes: Positive = 1
    """Number of machines."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """GPUs of each machine. 0: one process on the CPU."""
    memory_gib: Annotated[float, Field(gt=0)] = 80.0
    """Memory of one GPU, or of the host if there is no GPU."""
    interconnect_gbps: Annotated[float, Field(gt=0)] | None = None
    """How fast one GPU sends to others, in gigabits per second. null: 200 between nodes, 256 inside one."""
    tflops: Annotated[float, Field(gt=0)] = 312.0
    """Speed of one GPU for dense bf16 matrix products from its data sheet, in 10¹² operations per second."""
