"""DeepSpeed around a stage's model: its configuration, and the code that depends on the ZeRO stage.

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

from llm2vec_ds.distributed import Ranks, explain_failed_rendezvous
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
    """Joins this process to the others (NCCL on CUDA, gloo elsewhere). Returns its device."""
    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        set_defaults({"DS_ACCELERATOR": "cpu"}, "DeepSpeed")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Otherwise the first run on a CPU compiles a shared-memory collective, which takes about a minute. Ranks
    # of one node do not need it: gloo serves them.
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
        # A store in memory needs no port. So a port that another program holds cannot stop the run.
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    with explain_failed_rendezvous(ranks):
        deepspeed.init_distributed(backend, verbose=False)
    # DeepSpeed calls these functions by their old names at each step.
    renamed = "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    count_deepspeed_traffic()
    return torch.device("cuda", ranks.local_rank) if on_cuda else torch.device("cpu")


def deepspeed_config(recipe: Recipe, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: the JSON that the recipe names, with the recipe's own values.

    Raises:
        UserError: the file is missing, is no JSON object, or holds "auto". (Only the Hugging Face Trainer
            resolves "auto". DeepSpeed drops such values silently.) Or the groups of hpZ do not divide the
            number of ranks.
    """
    config = read_json(recipe.deepspeed) if recipe.deepspeed else {}
    check_combination(recipe, config, on_cuda=torch.cuda.is_available())
    group_size = min(config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1), world_size)
    if group_size > 1 and world_size % group_size:
        raise UserError(
            f"{recipe.deepspeed}: zero_hpz_partition_size {group_size} does not divide {world_size} ranks: "
            "set it to the number of GPUs of one node"
        )
    if overruled := [key for key in OWNED_BY_RECIPE if key in config]:
        log.warning("%s: the recipe sets %s; these keys are not used", recipe.deepspeed, ", ".join(overruled))
        config = {key: value for key, value in config.items() if key not in overruled}
    optimizer = recipe.optimizer
    return {
        **config,
        # The stage cuts micro-batches by tokens and counts them, so DeepSpeed sees one a step. It demands
        # that train_batch_size is the product of the other two and the number of ranks.
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
    """Returns the optimizer's section of the configuration.

    DeepSpeed refuses torch's Adam if it keeps the optimizer's states on the host. An optimizer that DeepSpeed
    does not build goes under its own key, and `Engine` takes it out again.
    """
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
    """Takes an optimizer that DeepSpeed does not know out of `config`. Returns a function that makes it."""
    options = config.pop(PAGED_8BIT, None)
    if options is None:
        return None
    import bitsandbytes

    return lambda parameters: bitsandbytes.optim.PagedAdamW8bit(
        parameters, **{**options, "betas": tuple(options["betas"])}
    )


def partition_for(config: dict[str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Returns a maker of contexts in which a model is loaded: one part a rank under ZeRO-3, else whole."""
    if config.get("zero_optimization", {}).get("stage") != 3:
        return nullcontext
    return partial(_partitioned_loading, config)


@contextmanager
def _partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """In this context, transformers' `from_pretrained` builds partitioned parameters (`zero.Init`).

    It fills them one by one: rank 0 maps the files, and each rank keeps its part of what rank 0 sends.

    Afterwards `torch.nn.functional.linear` is still DeepSpeed's version. Under ZeRO-3 `deepspeed.initialize`
    leaves it so anyway.
    """
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    seen_by_transformers = HfDeepSpeedConfig(config)  # transformers keeps only a weak reference to it
    try:
        with large_blocks_go_back():
            yield
    finally:
        unset_hf_deepspeed_config()
        del seen_by_transformers


def _cast_what_is_whole(model: nn.Module) -> None:
    """Casts the adapters of a partitioned trunk to bf16. The optimizer's copy stays fp32.

    DeepSpeed casts a whole model itself, but leaves one with partitioned parameters as it is. ZeRO-3 needs
    all parameters in one dtype.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.bfloat16()


def _gather_for_adapted_layers(model: nn.Module) -> None:
    """Lets ZeRO-3 gather a layer's weight and its adapter's before the one operation that uses all of them.

    By default ZeRO-3 gathers only a module's own parameters. Here they belong to the modules inside it.
    """
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
    """Says whether all that trains can be one flat parameter.

    Adapters must train (a scale or a projection may train beside them), and they must be whole on every rank.
    The optimizer must treat each number by itself. That of bitsandbytes does not: it works on blocks of each
    tensor, and keeps the moments of small tensors in 32 bits.
    """
    return (
        optimizer is None
        and config.get("zero_optimization", {}).get("stage", 0) < 3
        and any(".lora_" in name for name in named)
    )


class Engine:
    """A model under DeepSpeed: forward, backward, optimizer step, and gathered parameters.

    Below ZeRO-3 all adapters, and what trains beside them, are one flat parameter. DeepSpeed sees nothing
    else of the model.

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
            log.debug("%s tensors train as one of %s elements", len(named), self._flat.whole.numel())
        # bitsandbytes packs moments in blocks. They are no tensors of a parameter's shape.
        self.state = TrainableState(self._engine, flat=self._flat, has_moments=optimizer is None)

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs) if self._flat is None else self._model(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`. The step's `last` call averages the gradients over ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        if self._flat is not None:
            self._flat.find_gradient(loss)
            loss = self._engine(loss.detach())
        self._engine.backward(loss)

    def step(self, lr: float) -> float:
        """Takes one optimizer step at `lr`.

        Returns:
            The global gradient norm before clipping. 0 if the JSON turns it off (`measures_gradients`).

        Raises:
            RuntimeError: DeepSpeed skipped the step. The check for finite gradients should have made this
                impossible.
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
        """Returns the norm of the gradients, if they are whole in the parameters' `.grad`.

        None: an optimizer of DeepSpeed (ZeRO, bf16) holds them, and reports the norm after its step.
        """
        if self.zero_stage > 0 or self._engine.bfloat16_enabled():
            return None
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @property
    def addresses(self) -> Callable[[], tuple[int, int]] | None:
        """Returns where the trained weights and their gradients lie now.

        None: DeepSpeed holds each parameter separately, and its hooks have to see each gradient.
        """
        return None if self._flat is None else self._flat.addresses

    def write_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Writes to the monitors that the configuration names. Only rank 0 writes."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events([(name, value, step) for name, value in values.items()])

    def train(self, mode: bool = True) -> None:
        """Sets training or evaluation mode. Walks over all modules only if the mode changes."""
        if self._mode != mode:
            (self._engine if self._flat is None else self._model).train(mode)
            self._mode = mode

    def gather(self) -> Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]:
        """Returns a maker of contexts in which partitioned parameters are whole. A no-op below ZeRO-3."""
        if self.zero_stage < 3:
            return lambda parameters: nullcontext()
        import deepspeed

        return lambda parameters: deepspeed.zero.GatheredParameters(list(parameters))
