"""DeepSpeed around a stage's model: its configuration, and the few places where ZeRO shows.

Only this folder imports deepspeed, and only when a run starts.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from llm2vec_ds.distributed import Ranks, meeting
from llm2vec_ds.engine.combinations import check_combination
from llm2vec_ds.engine.comm_bytes import count_deepspeed_traffic
from llm2vec_ds.engine.flat_parameter import FlatParameter
from llm2vec_ds.engine.monitors import monitor_sections
from llm2vec_ds.engine.trainable_state import TrainableState
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.lora_linear import LoraLinear
from llm2vec_ds.process.environment import set_defaults
from llm2vec_ds.process.host_heap import large_blocks_go_back
from llm2vec_ds.recipe.deepspeed_json import (
    OWNED_BY_RECIPE,
    optimizer_is_offloaded,
    read_json,
)
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import OptimizerConfig

log = logging.getLogger(__name__)

PAGED_8BIT = "paged_adamw_8bit"


def start_process_group(ranks: Ranks) -> torch.device:
    """Joins this process to the others (NCCL on CUDA, gloo elsewhere); returns its device."""
    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        set_defaults({"DS_ACCELERATOR": "cpu"}, "DeepSpeed")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Without it the first run on a CPU compiles a shared-memory collective, about a minute, for ranks of
    # one node; gloo serves them as they are.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if on_cuda:
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {ranks.local_rank} has no GPU of its own ({torch.cuda.device_count()} visible): "
                "start as many processes as there are GPUs"
            )
        torch.cuda.set_device(ranks.local_rank)
    backend = "nccl" if on_cuda else "gloo"
    if ranks.world_size == 1 and not torch.distributed.is_initialized():
        # A store in memory: one process needs no port, so none can be taken by another program.
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    with meeting(ranks):
        deepspeed.init_distributed(backend, verbose=False)
    # DeepSpeed calls them by their old names, at each step.
    renamed = "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    count_deepspeed_traffic()
    return torch.device("cuda", ranks.local_rank) if on_cuda else torch.device("cpu")


def deepspeed_config(recipe: Recipe, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The JSON that the recipe names, with what the recipe owns filled in.

    Raises:
        UserError: the file is missing, no JSON object, or holds "auto" (which only the Hugging Face
            Trainer resolves; DeepSpeed drops such values silently); or hpZ's groups do not fill the world.
    """
    config = read_json(recipe.deepspeed) if recipe.deepspeed else {}
    check_combination(recipe, config, on_cuda=torch.cuda.is_available())
    group_size = min(config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1), world_size)
    if group_size > 1 and world_size % group_size:
        raise UserError(
            f"{recipe.deepspeed}: zero_hpz_partition_size {group_size} does not divide {world_size} ranks: "
            "set it to the GPUs of one node"
        )
    if overruled := [key for key in OWNED_BY_RECIPE if key in config]:
        log.warning("%s: the recipe sets %s; these keys are not used", recipe.deepspeed, ", ".join(overruled))
    optimizer = recipe.optimizer
    return {
        **config,
        # Micro-batches are cut by tokens and counted by the stage, so DeepSpeed sees one a step; it
        # demands that the product of these three holds.
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Explicit, because the default became 1.0 in DeepSpeed 0.19.3.
        "gradient_clipping": optimizer.max_grad_norm,
        **_optimizer(optimizer, torch_adam=not optimizer_is_offloaded(config)),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**62,
        **monitor_sections(recipe),
    }


def _optimizer(optimizer: OptimizerConfig, *, torch_adam: bool) -> dict[str, Any]:
    """DeepSpeed's section; it refuses torch's Adam where it keeps the states on the host. An optimizer that
    DeepSpeed does not build itself stands under a name of its own, for `Engine` to take out."""
    options = {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if optimizer.name == "paged_adamw_8bit":
        return {PAGED_8BIT: options, "zero_allow_untested_optimizer": True}
    return {"optimizer": {"type": "AdamW", "params": {**options, "torch_adam": torch_adam}}}


def _client_optimizer(config: dict[str, Any]) -> Callable[[Any], torch.optim.Optimizer] | None:
    """Maker of an optimizer that DeepSpeed does not know; taken out of `config`."""
    options = config.pop(PAGED_8BIT, None)
    if options is None:
        return None
    import bitsandbytes

    return lambda parameters: bitsandbytes.optim.PagedAdamW8bit(
        parameters, **{**options, "betas": tuple(options["betas"])}
    )


def partition_for(config: dict[str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Context maker for loading a model: under ZeRO-3 in parts, one for each rank; else whole."""
    if config.get("zero_optimization", {}).get("stage") != 3:
        return nullcontext
    return partial(_partitioned_loading, config)


@contextmanager
def _partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """transformers' `from_pretrained` builds partitioned parameters (`zero.Init`) in this context and fills
    them one by one: rank 0 maps the files, and each rank keeps its part of what rank 0 sends.

    `torch.nn.functional.linear` stays DeepSpeed's own afterwards, as `deepspeed.initialize` leaves it under
    ZeRO-3 anyway.
    """
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    seen_by_transformers = HfDeepSpeedConfig(config)  # which keeps a weak reference only
    try:
        with large_blocks_go_back():
            yield
    finally:
        unset_hf_deepspeed_config()
        del seen_by_transformers


def _cast_what_is_whole(model: nn.Module) -> None:
    """Adapters of a partitioned trunk to bf16, as DeepSpeed casts those of a whole one: it leaves a model
    with partitioned parameters as it is, and ZeRO-3 wants one dtype. The optimizer's copy is fp32."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.bfloat16()


def _gather_for_adapted_layers(model: nn.Module) -> None:
    """Lets ZeRO-3 gather a layer's weight and its adapter's before the one operation that uses them all:
    by itself it gathers a module's own parameters, and these belong to modules inside."""
    import deepspeed

    for layer in model.modules():
        if not isinstance(layer, LoraLinear):
            continue
        layer.gathers_weights = True
        layer.gathers_weights = layer.only_adapter(layer.get_base_layer().weight.dtype) is not None
        if layer.gathers_weights:
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, parameter)


def _can_be_flat(named: dict[str, nn.Parameter], config: dict[str, Any], optimizer: Any) -> bool:
    """Do adapters train (with few others: a scale, a projection), whole on every rank, by an optimizer that
    looks at each number alone?

    bitsandbytes' looks at blocks of each tensor, and keeps small tensors' moments in 32 bits.
    """
    return (
        optimizer is None
        and config.get("zero_optimization", {}).get("stage", 0) < 3
        and any(".lora_" in name for name in named)
    )


class Engine:
    """A model under DeepSpeed: forward, backward with a chosen boundary, step, whole parameters.

    Below ZeRO-3 adapters, and what trains beside them, are one flat parameter. DeepSpeed sees nothing else.

    Attributes:
        trainable: the parameters that DeepSpeed sees and steps.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any]) -> None:
        import deepspeed

        if config["bf16"]["enabled"]:
            _cast_what_is_whole(model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        config = dict(config)
        optimizer = _client_optimizer(config)
        self._model = model
        self._flat = FlatParameter(named) if _can_be_flat(named, config, optimizer) else None
        seen = model if self._flat is None else self._flat
        self.trainable = list(named.values()) if self._flat is None else [self._flat.whole]
        try:
            self._engine, *_ = deepspeed.initialize(
                model=seen, model_parameters=self.trainable, config=config, optimizer=optimizer
            )
        except ValidationError as error:  # a section of the JSON that the recipe names
            mistakes = "; ".join(f"`{m['loc'][0]}`: {m['msg']}" for m in error.errors())
            raise UserError(
                f"DeepSpeed refuses a section ({error.title}) of the JSON that `deepspeed` names: {mistakes}"
            ) from None
        self._mode: bool | None = None
        self.zero_stage = int(self._engine.zero_optimization_stage())
        self.measures_gradients = config.get("zero_optimization", {}).get("compute_grad_norm", True)
        if self.zero_stage == 3:
            _gather_for_adapted_layers(model)
        if self._flat is not None:
            self._flat.link()
            log.info("%s tensors train as one of %s elements", len(named), self._flat.whole.numel())
        # bitsandbytes packs its moments in blocks that are no tensors of a parameter's shape.
        self.state = TrainableState(self._engine, flat=self._flat, has_moments=optimizer is None)

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs) if self._flat is None else self._model(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`, averaged over ranks when the step's `last` call is through."""
        self._engine.set_gradient_accumulation_boundary(last)
        if self._flat is not None:
            self._flat.find_gradient(loss)
            loss = self._engine(loss.detach())
        self._engine.backward(loss)

    def step(self, lr: float) -> float:
        """One optimizer step at `lr`; returns the global gradient norm before clipping, 0 where the JSON
        forbids to compute it (`measures_gradients`).

        Raises:
            RuntimeError: DeepSpeed skipped the step, which the check for finite gradients should have
                made impossible.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        skipped_before = self._engine.skipped_steps
        norm_before_clipping = self._whole_gradient_norm()
        self._engine.step()
        if self._flat is not None:
            self._flat.link()
        if self._engine.skipped_steps != skipped_before:
            raise RuntimeError("DeepSpeed skipped an optimizer step although every gradient was finite")
        return float(norm_before_clipping or self._engine.get_global_grad_norm() or 0.0)

    def _whole_gradient_norm(self) -> torch.Tensor | None:
        """Norm of gradients that stand whole in the parameters; None where an optimizer of DeepSpeed's
        own (ZeRO, bf16) holds them and reports the norm after its step."""
        if self.zero_stage > 0 or self._engine.bfloat16_enabled():
            return None
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @property
    def addresses(self) -> Callable[[], tuple[int, int]] | None:
        """Where the weights that train and their gradients lie now; None: DeepSpeed owns each by itself, and
        its hooks have to see each gradient."""
        return None if self._flat is None else self._flat.addresses

    def write_metrics(self, values: Mapping[str, float], step: int) -> None:
        """To the monitors that the configuration names; rank 0 writes."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events([(name, value, step) for name, value in values.items()])

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode; a walk over all modules only where it changes."""
        if self._mode != mode:
            (self._engine if self._flat is None else self._model).train(mode)
            self._mode = mode

    def gather(self) -> Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]:
        """Context maker that makes partitioned parameters whole; a no-op below ZeRO-3."""
        if self.zero_stage < 3:
            return lambda parameters: nullcontext()
        import deepspeed

        return lambda parameters: deepspeed.zero.GatheredParameters(list(parameters))
