"""Plans a recipe on its machine: the memory it needs, what fits, and what a step costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds.model.adapter_stack import read_stack
from llm2vec_ds.model.attention import head_dim_of
from llm2vec_ds.model.graphs.suitable import is_busy
from llm2vec_ds.model.loading import TrunkOptions
from llm2vec_ds.model.quantization import weight_storages
from llm2vec_ds.planner.meta_model import (
    MetaModel,
    meta_model,
    model_config,
    put_adapters_in,
    trainable_shapes,
)
from llm2vec_ds.planner.simulate import PassBytes, simulate
from llm2vec_ds.planner.states import States, states
from llm2vec_ds.planner.step_time import Speed, StepTime, Work, assumed_speed, operations
from llm2vec_ds.planner.traffic import bandwidth_gbps, step_bytes
from llm2vec_ds.planner.workload import Bank, Workload, embedding_bank, workload
from llm2vec_ds.recipe.deepspeed_json import read_json
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import MachineConfig

GIB = 2**30
RESERVED = {"cuda": GIB * 3 // 4, "cpu": GIB}
"""Bytes taken besides our tensors: by CUDA's context and libraries, or on a CPU by Python with torch."""
FRAGMENTATION = 0.05
"""Share of the tensors' bytes that fragmentation adds."""
BY_COST = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
"""Files in ds_configs/, from least to most traffic."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `peak` is not the sum of the parts: the loss and a micro-batch do not run at once."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    temporaries: int
    logits_chunk: int
    embedding_bank: int
    graphs: int
    reserved: int
    peak: int
    host: int


@dataclass(frozen=True)
class Choice:
    """What one DeepSpeed JSON would need on this machine."""

    deepspeed: str | None
    peak: int
    host: int
    fits: bool
    sent_bytes: int


@dataclass(frozen=True)
class Shapes:
    """Sizes of the meta model. They serve any ZeRO stage and any number of texts in a micro-batch."""

    frozen_bytes: int
    frozen: list[torch.Size]
    trainable: list[torch.Size]
    n_parameters: int
    linear_parameters: int
    attention_width: int
    vocabulary: int
    width: int
    dtype: torch.dtype
    two_sizes: tuple[tuple[int, PassBytes], tuple[int, PassBytes]]

    def one_pass(self, n_texts: int) -> PassBytes:
        """Returns the bytes of a pass of `n_texts`, on the straight line through the two simulated sizes."""
        (n_a, a), (n_b, b) = self.two_sizes

        def line(x: int, y: int) -> int:
            return round(x + (y - x) * (n_texts - n_a) / (n_b - n_a))

        return PassBytes(line(a.activations, b.activations), line(a.peak, b.peak), min(a.logits, b.logits))


class Planner:
    """Plans a recipe on a machine. The slow part runs once, here, on the meta device."""

    def __init__(
        self, recipe: Recipe, recipe_file: Path | None = None, machine: MachineConfig | None = None
    ) -> None:
        """Raises UserError if the model's config.json is not on this machine."""
        self.recipe = recipe
        self.machine = machine or recipe.machine
        self.device = torch.device("cuda" if self.machine.gpus_per_node else "cpu")
        self.world_size = self.machine.nodes * max(1, self.machine.gpus_per_node)
        self.load = workload(recipe, self.world_size)
        self.shapes = shapes(recipe, model_config(recipe, recipe_file), self.device, self.load)

    def zero(self, deepspeed: str | None) -> dict[str, Any]:
        section = (read_json(deepspeed) if deepspeed else {}).get("zero_optimization", {})
        return dict(section)

    def states(self, deepspeed: str | None) -> States:
        return states(
            self.shapes.frozen_bytes,
            self.shapes.frozen,
            self.shapes.trainable,
            self.shapes.dtype,
            self.zero(deepspeed),
            self.world_size,
            eight_bit=self.recipe.optimizer.name == "paged_adamw_8bit",
            averaged=self.recipe.optimizer.ema is not None,
        )

    def bank(self, load: Workload | None = None) -> Bank:
        return embedding_bank(load or self.load, self.shapes.width)

    def memory(self, deepspeed: str | None, load: Workload | None = None) -> Memory:
        load = load or self.load
        held, bank, one = self.states(deepspeed), self.bank(load), self.shapes.one_pass(load.texts_per_pass)
        # The optimizer's step needs fp32 gradients and one fp32 temporary of the same size. Offloaded, it
        # runs on the host.
        trainable_part = sum(s.numel() for s in self.shapes.trainable) // (
            self.world_size if self.zero(deepspeed) else 1
        )
        optimizer_step = 0 if held.optimizer == 0 else 2 * 4 * trainable_part
        graphs = self._graphs(deepspeed, load)
        if graphs:
            # CUDA graphs keep a pass's memory in their own pool, which nothing else can use. So it adds to
            # the largest other moment. One such moment is the warm-up of another length, with its
            # activations.
            step = one.peak + max(bank.kept, bank.in_loss, optimizer_step, one.activations) + graphs
        elif load.cached:
            # Passes run while the vectors wait. The loss runs between passes, without activations.
            step = max(one.peak + bank.kept, bank.in_loss, optimizer_step)
        else:
            # A single pass holds its activations while the loss runs.
            step = max(one.peak, one.activations + bank.in_loss, optimizer_step)
        tensors = held.on_device + step
        reserved = RESERVED[self.device.type] + int(FRAGMENTATION * tensors)
        return Memory(
            weights=held.frozen,
            adapters=held.trainable,
            gradients=held.gradients,
            optimizer=held.optimizer,
            buffers=held.buffers,
            activations=one.activations,
            temporaries=one.peak - one.activations,
            logits_chunk=one.logits,
            embedding_bank=bank.in_loss,
            graphs=graphs,
            reserved=reserved,
            peak=tensors + reserved,
            host=held.host,
        )

    def _graphs(self, deepspeed: str | None, load: Workload) -> int:
        """Returns the bytes of the hidden states and gradients that recorded passes write to.

        0 if no pass is recorded.
        """
        recipe = self.recipe
        can = (
            self.device.type == "cuda"
            and recipe.model.cuda_graphs != "off"
            and recipe.adapter is not None
            and recipe.adapter.variant != "dora"
            and recipe.optimizer.name == "adamw"
            and recipe.model.activation_checkpointing != "full"
            and self.zero(deepspeed).get("stage", 0) < 3
        )
        n_tokens = load.texts_per_pass * load.tokens_per_text
        if not can or (recipe.model.cuda_graphs == "auto" and is_busy(self.shapes.n_parameters, n_tokens)):
            return 0
        return 2 * n_tokens * self.shapes.width * self.shapes.dtype.itemsize

    def limit(self) -> int:
        return int(self.machine.memory_gib * GIB)

    def fits(self, deepspeed: str | None, load: Workload | None = None) -> bool:
        return self.memory(deepspeed, load).peak <= self.limit()

    def sent_bytes(self, deepspeed: str | None) -> int:
        item = self.shapes.dtype.itemsize
        return step_bytes(
            self.load,
            self.zero(deepspeed),
            gradient_bytes=item * sum(s.numel() for s in self.shapes.trainable),
            weight_bytes=item * self.shapes.n_parameters,
            width=self.shapes.width,
            recomputes=self.recipe.model.activation_checkpointing != "none",
        )

    def work(self, n_tokens: float | None = None) -> Work:
        """Returns the work of one rank's step with `n_tokens` tokens; None: all texts have full length."""
        load, shapes_ = self.load, self.shapes
        whole = load.texts * load.tokens_per_text
        n_tokens = whole if n_tokens is None else n_tokens
        micro_batches = max(1, round(load.micro_batches * n_tokens / whole))
        cached = load.objective.embedding_cache and micro_batches > 1
        return Work(
            operations(
                self.recipe,
                n_tokens,
                n_tokens / load.texts,
                cached=cached,
                linear_parameters=shapes_.linear_parameters,
                attention_width=shapes_.attention_width,
                head_parameters=shapes_.vocabulary * shapes_.width,
                head_rows=n_tokens * load.objective.head_rows_per_token,
            ),
            micro_batches * (2 if cached else 1),
        )

    def step_time(self, speed: Speed | None = None) -> StepTime | None:
        """Estimates a step's time from a fitted speed, or else from a GPU's assumed speed.

        None for a CPU without a fitted speed: nothing is assumed there.
        """
        if speed is None:
            if self.device.type == "cpu":
                return None
            speed = assumed_speed(self.machine)
        sent = self.sent_bytes(self.recipe.deepspeed) * 8 / (self.bandwidth_gbps() * 1e9)
        return StepTime(speed.seconds(self.work()) * 1e3, sent * 1e3)

    def largest_token_budget(self) -> int:
        """Returns the largest `batch.micro_batch_tokens` that fits, in whole texts; 0 if none fits."""
        n_texts = _largest(lambda n: self.fits(self.recipe.deepspeed, self._with_texts_per_pass(n)))
        return n_texts * self.load.tokens_per_text

    def largest_global_batch(self) -> int | None:
        """Returns the largest `batch.global_batch_size` whose vectors fit. None: no embedding cache."""
        if not self.load.objective.embedding_cache:
            return None
        a_rank = _largest(lambda n: self.fits(self.recipe.deepspeed, self._with_examples(n)))
        return a_rank * self.world_size

    def _with_texts_per_pass(self, n_texts: int) -> Workload:
        texts = max(n_texts, self.load.texts)
        return dataclasses.replace(self.load, texts_per_pass=n_texts, texts=texts)

    def _with_examples(self, n: int) -> Workload:
        """Returns the work of `n` rows a rank. The token budget stays, so a larger batch has more passes."""
        factor = n / self.load.rows
        budget = max(1, self.recipe.batch.micro_batch_tokens // self.load.tokens_per_text)
        texts = round(self.load.texts * factor)
        return dataclasses.replace(
            self.load,
            texts=texts,
            texts_per_pass=min(texts, budget),
            rows=n,
            documents=round(self.load.documents * factor),
        )

    def choices(self) -> list[Choice]:
        """Returns the needs of the recipe's own JSON, and of those beside it or in ds_configs/."""
        names: list[str | None] = [None] if self.world_size == 1 else []
        if folder := _ds_configs(self.recipe):
            wanted: tuple[str, ...] = BY_COST[2:] if self.world_size == 1 else BY_COST
            if self.recipe.model.quantization is not None:
                wanted = tuple(name for name in wanted if name != "zero3_offload")
            if self.recipe.optimizer.name != "adamw":
                wanted = tuple(name for name in wanted if "offload" not in name)
            names += [str(path) for name in wanted if (path := folder / f"{name}.json").is_file()]
        if self.recipe.deepspeed not in names:
            names.append(self.recipe.deepspeed)
        return [self._choice(name) for name in names]

    def _choice(self, name: str | None) -> Choice:
        memory = self.memory(name)
        return Choice(name, memory.peak, memory.host, memory.peak <= self.limit(), self.sent_bytes(name))

    def bandwidth_gbps(self) -> float:
        return bandwidth_gbps(self.machine)


def shapes(recipe: Recipe, config: Any, device: torch.device, load: Workload) -> Shapes:
    """Builds the model on the meta device, counts its sizes, and runs its first layers there."""
    options = TrunkOptions(causal=recipe.model.causal, precision=recipe.model.precision, device=device)
    model = meta_model(recipe, config, options)
    n_layers = model.n_layers
    own = list(model.whole.parameters())
    trainable = trainable_shapes(model, recipe.adapter)
    trainable += load.objective.trainable
    text_config = model.trunk.config.get_text_config()
    head_dim = head_dim_of(text_config) or (text_config.hidden_size // text_config.num_attention_heads)
    counted = sum(weight_storages(model.whole).values())
    # A later stage of QLoRA also holds the adapters of the earlier stages. If these have not run yet, one
    # earlier stage is assumed.
    path = recipe.model.path  # only a folder can hold earlier adapters; the hub is not asked
    n_stacked = len(read_stack(path, recipe.model.quantization, None).earlier) if Path(path).is_dir() else 0
    if recipe.model.quantization is not None and load.objective.follows_another:
        n_stacked = max(n_stacked, 1)
    counted += n_stacked * options.dtype.itemsize * sum(shape.numel() for shape in trainable)
    return_values: dict[str, Any] = {
        "frozen_bytes": counted - (0 if recipe.adapter else sum(p.numel() * p.itemsize for p in own)),
        "frozen": [p.shape for p in own] if recipe.adapter else [],
        "trainable": trainable,
        "n_parameters": sum(_whole_shape(p).numel() for p in own)
        + (sum(s.numel() for s in trainable) if recipe.adapter else 0),
        "linear_parameters": _linear_parameters(model),
        "attention_width": n_layers * text_config.num_attention_heads * head_dim,
        "vocabulary": text_config.vocab_size,
        "width": text_config.hidden_size,
        "dtype": options.dtype,
    }
    return Shapes(**return_values, two_sizes=_two_sizes(model, recipe, options, load, n_layers))


def _two_sizes(
    model: MetaModel, recipe: Recipe, options: TrunkOptions, load: Workload, n_layers: int
) -> tuple[tuple[int, PassBytes], tuple[int, PassBytes]]:
    """Returns the bytes of a pass of the planned size, and of a pass twice as large.

    Runs three layers, then two. The difference is one layer, which is added for each of the other layers.
    """
    few, more = min(2, n_layers), min(3, n_layers)
    model.cut(more)
    put_adapters_in(model, recipe, options)
    sizes = (load.texts_per_pass, 2 * load.texts_per_pass)
    long = [simulate(model, recipe, n, load.tokens_per_text) for n in sizes]
    model.cut(few)
    short = [simulate(model, recipe, n, load.tokens_per_text) for n in sizes]
    passes = []
    for a, b in zip(short, long, strict=True):
        activations = b.activations + (n_layers - more) * (b.activations - a.activations)
        passes.append(PassBytes(activations, activations + b.peak - b.activations, b.logits))
    return (sizes[0], passes[0]), (sizes[1], passes[1])


def _whole_shape(parameter: Any) -> torch.Size:
    """Returns a parameter's shape. A weight in 4 bits is stored packed: its original shape counts."""
    state = getattr(parameter, "quant_state", None)
    shape: torch.Size = parameter.shape if state is None else state.shape
    return shape


def _linear_parameters(model: MetaModel) -> int:
    linear = (m for m in model.trunk.modules() if isinstance(m, torch.nn.Linear))
    return sum(m.in_features * m.out_features for m in linear)


def _largest(fits: Any) -> int:
    """Returns the largest n ≥ 1 that fits, by bisection; 0 if none fits. Memory has to grow with n."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 2**40:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _ds_configs(recipe: Recipe) -> Path | None:
    own = [Path(recipe.deepspeed).parent] if recipe.deepspeed else []
    return next((folder for folder in (*own, Path("ds_configs")) if folder.is_dir()), None)
