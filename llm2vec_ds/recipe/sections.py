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
    """True keeps the decoder's causal attention (a baseline); False makes it bidirectional."""
    attention: Literal["auto", "triton", "flash_attn", "varlen", "torch"] = "auto"
    """Attention backend, `auto`, `triton`, `flash_attn` (the package), `varlen` (torch's) or `torch`; `auto`
    picks by device and says what it picked and why (docs/kernels.md)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Trunk weights and activations. `auto`: bf16 on CUDA, fp32 on CPU (where bf16 is very slow)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What backward computes again: `none`; `selective`, norms and gated units, while matrix products and
    attention are kept (docs/performance.md); `full`, whole layers: least memory, about a third more time."""
    fused_layers: Literal["auto", "off"] = "auto"
    """`auto` runs norms, rotary embeddings and gated units as one operation each, where their code is known
    (docs/kernels.md); `off` leaves them to transformers."""
    cuda_graphs: Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)] = "auto"
    """CUDA graphs: the trunk's passes are recorded once for each of a few lengths and replayed, so that the
    GPU does not wait for Python. `auto` records where it can and it pays, and logs why not elsewhere; `on`
    refuses where it cannot (docs/performance.md)."""
    trust_remote_code: bool = False
    """Run code that lies beside the model, where it needs its own: read it first. Only `train`, `prepare` and
    `plan` ever do, so the other commands refuse the encoder of such a run (docs/security.md)."""
    quantization: Literal["nf4"] | None = None
    """`nf4` holds the trunk's frozen linear weights in 4 bits (QLoRA, arXiv 2305.14314); only adapters
    train (docs/qlora.md)."""
    config_file: Place | None = None
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
    """Column that holds the query's right document, or a list of them: an example for each."""
    positives: Literal["all", "one_per_epoch"] = "all"
    """`one_per_epoch`: of a query with several positives, in a list or in several rows, each epoch draws one,
    so that no query counts for more than another."""
    negative_column: str = "negative"
    """Column that holds a hard negative, or a list of them; or several columns, with numbers after this name:
    `negative_1`, `negative_2` …"""
    max_negatives: Annotated[int, Field(ge=0)] = 1
    """Hard negatives of an example that are used, from the first on; 0: the column is not read."""
    instructions: Place | None = None
    """YAML file, `source: instruction for its queries`, or `source: {query: …, document: …, group: …}`;
    sources of one group share batches. null: `data.instruction` before every query."""
    sampling_temperature: Annotated[float, Field(gt=0)] = 1.0
    """A batch's source is drawn in proportion to (number of its batches)^(1/temperature): 1 is
    proportional, larger is more even."""


class DataConfig(Section):
    """Where the training texts come from."""

    path: Place | list[Place]
    """A file, several, or a folder of them: .txt (a text a line), .jsonl, .json, .csv, .tsv (these also .gz,
    .bz2, .xz) or .parquet; or a hub data set, `hub:owner/name`, `hub:owner/name:config@split`."""
    text_column: str = "text"
    """Column that holds the text, in all formats but .txt."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """What becomes of a row that is not what its format says, or holds no text where one should be: `raise`
    stops with its line, `skip` leaves it out and counts it."""
    max_tokens: Annotated[int, Field(ge=4)] = 128
    """A text's longest length in tokens, special tokens and instruction counted."""
    long_texts: Literal["truncate", "split"] = "truncate"
    """What becomes of a longer text: its head is kept, or it is cut into blocks of `max_tokens`."""
    instruction: str | None = None
    """Put before each text; attended, but not pooled."""
    template: str | None = None
    """What stands around instruction and text: a form such as `Instruct: {instruction} Text: {text}`, or
    `chat` for the tokenizer's own chat template; null: instruction, a blank, text."""
    held_out_path: Place | list[Place] | None = None
    """Texts that measure and never train, in the same format as `path`."""
    pairs: PairsConfig | None = None
    prepared_dir: Place | None = None
    """Where tokenised texts are kept; null: `prepared/` in the cache folder of this user."""


class BatchConfig(Section):
    """How much goes into a step, and into one forward pass."""

    global_batch_size: Positive = 32
    """Texts a step, over all ranks. The result does not depend on how ranks share them."""
    micro_batch_tokens: Positive = 4096
    """Tokens of one forward pass on one rank; texts are packed into it without padding."""
    halve_if_out_of_memory: bool = False
    """Where the first step does not fit into memory, all ranks start again with half of
    `micro_batch_tokens`, and so on down to `data.max_tokens`."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then a constant or falling rate."""

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
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the trainable weights, such as 0.999, which measurements during training
    and the encoder take (docs/merging.md); null: none."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """After warm-up: stay, fall to zero at `max_steps` linearly or as a cosine (arXiv 1608.03983), or stay
    and fall linearly at the end (warm-up, stable, decay: arXiv 2404.06395)."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of `wsd`: the share of `max_steps` in which the rate falls."""


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
    signals: list[Signal] = DEFAULT_SIGNALS
    """Signals that ask for a checkpoint at the step's end and exit code 75; so do Ctrl-C (INT), a closed
    terminal (HUP) and a file `STOP` in `output_dir`."""


class WordsConfig(Section):
    """A word-level task."""

    train: Place
    """A .conllu or CoNLL column file, or hub:owner/name@split."""
    test: Place
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
    exclude_self: bool = False
    """Of `retrieval:FOLDER`: a document with the query's own id is not ranked."""
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
