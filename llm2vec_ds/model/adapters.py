"""Puts LoRA on a bare trunk, and merges adapters into the trunk's weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.quantization import dequantized
from llm2vec_ds.recipe.sections import AdapterConfig

TRAINED = "default"
"""The name of the adapter that trains."""
GatherParameters = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]


def add_lora(trunk: nn.Module, config: AdapterConfig, name: str = TRAINED) -> list[str]:
    """Freezes the trunk and puts trainable fp32 adapters on its linear layers. Returns the layers' names.

    Earlier adapters with other names stay. They are frozen and still add their updates.

    Raises:
        UserError: one of `target_modules` matches no linear layer, or matches a layer of another kind.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    from llm2vec_ds.model.lora_linear import lora_linear_for, share_dropout

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        init_lora_weights="pissa_niter_16" if config.variant == "pissa" else config.zero_init,
    )
    lora._register_custom_module({nn.Linear: lora_linear_for})
    earlier = adapter_names(trunk)
    if isinstance(targets, list):
        _check_targets(trunk, targets)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # stacked on purpose
            inject_adapter_in_model(lora, trunk, name)
    except ValueError as error:
        raise UserError(
            f"adapter.target_modules {targets}: {str(error).splitlines()[0][:120]}; "
            f"linear layers here: {_linear_layers(trunk)}"
        ) from None
    layers = {where: module for where, module in trunk.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        layer.set_adapter([n for n in (*earlier, name) if n in layer.lora_A])
    share_dropout(trunk)
    for where, parameter in trunk.named_parameters():
        parameter.requires_grad_(_belongs_to(where, name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return [where for where, layer in layers.items() if name in layer.lora_A]


def _check_targets(trunk: nn.Module, targets: list[str]) -> None:
    """Refuses targets that match nothing or match other layers than linear ones.

    peft ignores a target that matches nothing. It also wraps embeddings, whose update has other names.
    """
    for target in targets:
        found = [(n, m) for n, m in trunk.named_modules() if n == target or n.endswith(f".{target}")]
        what = f"adapter.target_modules: {target!r}"
        if not found:
            raise UserError(
                f"{what} matches nothing in this trunk (a language head is no part of it); linear layers "
                f"here: {_linear_layers(trunk)}"
            )
        for name, module in found:
            check_is_linear(name, getattr(module, "base_layer", module), what, _linear_layers(trunk))


def check_is_linear(name: str, layer: Any, what: str, known: str = "") -> None:
    """Refuses an adapter on an embedding or another layer that is not linear. `what` names the adapter."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(layer, nn.Linear | Conv1D):
        here = f"; linear layers here: {known}" if known else ": train it without that layer"
        raise UserError(
            f"{what} is on {name} ({type(layer).__name__}), but adapters are for linear layers{here}"
        )


def _linear_layers(trunk: nn.Module) -> str:
    # An adapter renames its layer to NAME.base_layer.
    names = (n for n, m in trunk.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n)
    return ", ".join(sorted({n.removesuffix(".base_layer").rpartition(".")[2] for n in names}))


def n_fused(trunk: nn.Module) -> int:
    """Counts linear layers that are fused with their adapter (`LoraLinear`). The others run peft's code."""
    from llm2vec_ds.model.lora_linear import LoraLinear

    layers = (module for module in trunk.modules() if isinstance(module, LoraLinear))
    return sum(layer.only_adapter(layer.get_base_layer().weight.dtype) is not None for layer in layers)


def adapter_names(trunk: nn.Module) -> list[str]:
    """Returns the names of the adapters on a trunk, in the order in which they were added."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, None] = {}
    for module in trunk.modules():
        if isinstance(module, LoraLayer):
            found |= dict.fromkeys(module.lora_A)
    return list(found)


def _belongs_to(parameter_name: str, adapter: str) -> bool:
    """Says whether a parameter belongs to an adapter.

    peft's names end in `lora_A.ADAPTER.weight`. DoRA also has `lora_magnitude_vector.ADAPTER.weight`.
    """
    parts = parameter_name.split(".")
    return len(parts) > 2 and parts[-2] == adapter and parts[-3].startswith("lora_")


def merged_weight(layer: Any) -> torch.Tensor:
    """Returns a layer's matrix with every active adapter's update, in fp32. Dequantises 4-bit weights first.

    LoRA adds scale · B·A. DoRA (arXiv 2402.09353) replaces W by m · (W + scale · B·A) / ‖W + scale · B·A‖,
    row by row. Its update is the difference to W.
    """
    base = dequantized(layer.get_base_layer().weight).float()
    total = base.clone()
    for name in layer.active_adapters:
        update = layer.get_delta_weight(name).float()
        if layer.use_dora.get(name):
            moved = base + update
            length = layer.lora_magnitude_vector[name].weight.float() / moved.norm(dim=1)
            update = moved * length[:, None] - base
        total += update
    return total


def merged_state_dict(
    trunk: nn.Module,
    gather: GatherParameters = lambda parameters: nullcontext(),
    *,
    in_place: bool = False,
) -> dict[str, torch.Tensor]:
    """Returns the trunk's weights under their original names, with each adapter's update added in fp32.

    4-bit weights are returned as the dequantised matrices on which the adapters were trained.

    Args:
        gather: makes a context in which partitioned parameters are whole (ZeRO-3). Every rank must call this
            function. Layers are gathered one by one, so no rank ever holds more than one extra layer.
        in_place: adds the updates to the trunk's own weights and returns these. No second copy is made, but
            the trunk cannot be used afterwards. Not for 4-bit or partitioned weights. If False, copies are
            made on the CPU.

    Raises:
        RuntimeError: a parameter is empty or not whole although it was gathered.
    """
    from peft.tuners.lora import LoraLayer

    def given(value: torch.Tensor) -> torch.Tensor:
        return value.detach() if in_place else value.detach().cpu().clone()

    state: dict[str, torch.Tensor] = {}
    inside_adapters: tuple[str, ...] = ()
    for name, module in trunk.named_modules():
        if inside_adapters and name.startswith(inside_adapters):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, LoraLayer):
            inside_adapters += (prefix,)
            with gather(list(module.parameters())):
                check_whole(prefix, module.named_parameters())
                base = module.get_base_layer()
                merged = merged_weight(module).to(base.weight.dtype)
                state[f"{prefix}weight"] = base.weight.detach().copy_(merged) if in_place else given(merged)
                if base.bias is not None:
                    state[f"{prefix}bias"] = given(base.bias)
            continue
        own = dict(module.named_parameters(recurse=False))
        with gather(list(own.values())):
            check_whole(prefix, own.items())
            state.update({prefix + key: given(dequantized(value)) for key, value in own.items()})
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                state[prefix + key] = given(buffer)
    return state


def check_whole(prefix: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuses empty or partial tensors, which ZeRO-3 gives if gathering goes wrong."""
    for name, parameter in parameters:
        whole: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's whole shape
        if parameter.shape != whole or parameter.numel() == 0:
            raise RuntimeError(
                f"{prefix}{name} has shape {tuple(parameter.shape)} instead of {tuple(whole)}: its parts "
                "were not gathered. No weights were written"
            )
