"""LoRA on a bare trunk, and the trunk's weights with the adapters merged in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from llm2vec_ds.config import AdapterConfig
from llm2vec_ds.errors import UserError

GatherParameters = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]


def add_lora(trunk: nn.Module, config: AdapterConfig) -> list[str]:
    """Freezes the trunk and puts trainable fp32 adapters on its linear layers; returns their names.

    Raises:
        UserError: `target_modules` match no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

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
    trunk.requires_grad_(False)
    try:
        inject_adapter_in_model(lora, trunk)
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in trunk.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"adapter.target_modules {targets}: {str(error).splitlines()[0][:120]}; "
            f"linear layers here: {', '.join(linear)}"
        ) from None
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return [name for name, module in trunk.named_modules() if isinstance(module, LoraLayer)]


def merged_state_dict(
    trunk: nn.Module, gather: GatherParameters = lambda parameters: nullcontext()
) -> dict[str, torch.Tensor]:
    """The trunk's weights on the CPU under their original names, each adapter's update added in fp32.

    Args:
        gather: context that makes partitioned parameters whole (ZeRO-3); every rank must call this
            function, layer by layer in the same order, and no rank ever holds more than one layer extra.

    Raises:
        RuntimeError: a parameter is empty or not whole although gathered.
    """
    from peft.tuners.lora import LoraLayer

    state: dict[str, torch.Tensor] = {}
    inside_adapters: tuple[str, ...] = ()
    for name, module in trunk.named_modules():
        if inside_adapters and name.startswith(inside_adapters):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, LoraLayer):
            inside_adapters += (prefix,)
            with gather(list(module.parameters())):
                _check_whole(prefix, module.named_parameters())
                base = module.get_base_layer()
                update = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
                weight = base.weight.detach().float() + update
                state[f"{prefix}weight"] = weight.to(base.weight.dtype).cpu().clone()
                if base.bias is not None:
                    state[f"{prefix}bias"] = base.bias.detach().cpu().clone()
            continue
        own = dict(module.named_parameters(recurse=False))
        with gather(list(own.values())):
            _check_whole(prefix, own.items())
            state.update({prefix + key: value.detach().cpu().clone() for key, value in own.items()})
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                state[prefix + key] = buffer.detach().cpu().clone()
    return state


def _check_whole(prefix: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuses what ZeRO-3 writes when it goes wrong: empty or partial tensors."""
    for name, parameter in parameters:
        whole: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the shape there
        if parameter.shape != whole or parameter.numel() == 0:
            raise RuntimeError(
                f"{prefix}{name} has shape {tuple(parameter.shape)} instead of {tuple(whole)} at its "
                "saving: its parts were not gathered. No weights were written"
            )
