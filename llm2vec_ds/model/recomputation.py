"""Which activations are kept for backward, and which are computed again (activation checkpointing)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llm2vec_ds.model.fused_layers import GATED_UNITS, NORMS, make_again
from llm2vec_ds.model.input_dropout import InputDropout
from llm2vec_ds.model.lora_linear import LoraLinear

Recomputation = Literal["none", "selective", "full"]


def recompute_activations(trunk: Any, which: Recomputation) -> str:
    """Makes a transformers trunk compute activations again in backward, in training mode.

    Args:
        which: `none`; `full`, whole layers; or `selective`: norms, rotary embeddings and gated units take
            little time and half of the memory, matrix products and attention are kept (the name is that of
            Korthikanti et al., 2022, arXiv 2205.05198, who recompute the scores of attention, which fused
            attention does not hold).

    Returns:
        What was done, for a log.
    """
    if which == "none":
        return "none"
    if which == "selective" and layers_keep_origins(trunk):
        again = make_again(trunk)
        return "selective: backward makes again " + ", ".join(f"{n} {kind}" for kind, n in again.items())
    dropouts = {layer.dropouts for layer in trunk.modules() if isinstance(layer, LoraLinear)}
    contexts = _keep_and_replay if which == "selective" else lambda: (nullcontext(), nullcontext())
    trunk.activation_checkpointing_enable(
        {
            "use_reentrant": False,
            "context_fn": lambda: tuple(_Fresh(dropouts, context) for context in contexts()),
        }
    )
    return "full" if which == "full" else "selective, operation by operation: not all of a layer is known"


def runs_layers_twice(trunk: Any) -> bool:
    """Does backward run layers again by torch's checkpointing, which sets torch's generator back?"""
    return any(getattr(part, "gradient_checkpointing", False) for part in trunk.modules())


def layers_keep_origins(trunk: Any) -> bool:
    """Is all that a layer computes between its products a known norm or gated unit, and does each trained
    product know their origins (`origins.py`)?"""
    adapted = [layer for layer in trunk.modules() if isinstance(layer, LoraLayer)]
    if not adapted or not all(isinstance(layer, LoraLinear) and layer.is_plain() for layer in adapted):
        return False
    if any(p.requires_grad for name, p in trunk.named_parameters() if ".lora_" not in name):
        return False
    kinds = {getattr(module, "fused_kind", None) for module in trunk.modules()}
    return not kinds.isdisjoint(NORMS) and not kinds.isdisjoint(GATED_UNITS)


class _Fresh(AbstractContextManager[None]):
    """A layer's dropout depends on torch's generator alone, in forward and in its second run."""

    def __init__(self, dropouts: Iterable[InputDropout], inner: AbstractContextManager[Any]) -> None:
        self._dropouts, self._inner = dropouts, inner

    def __enter__(self) -> None:
        self._forget()
        self._inner.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._inner.__exit__(*exception)
        self._forget()

    def _forget(self) -> None:
        for dropout in self._dropouts:
            dropout.forget()


_FACTOR = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, torch.ops.aten.addmm.default: 1}
"""Products, and the place of the factor whose last dimension is summed over."""
_CHEAP_SUM = 256
"""A product over no more than that costs little for what its result holds: an adapter's update, or scores."""
_FUSED = frozenset(
    f"{name}.default"
    for name in (
        "llm2vec_ds.lora_linear",
        "mkldnn._linear_pointwise",
        "llm2vec.cpu_attention",
        "llm2vec.flash_attention",
        "llm2vec_ds.attention_shapes",  # what stands for it in a plan
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
    )
)
"""Kept whatever their size. Attention that is none of these operations runs again."""


def _is_kept(func: Any, args: tuple[Any, ...]) -> bool:
    factor = _FACTOR.get(func)
    if factor is None:
        return _is_fused(func)
    return int(args[factor].shape[-1]) > _CHEAP_SUM


@cache
def _is_fused(func: Any) -> bool:
    return str(func) in _FUSED  # by name: not all of them are there in every torch


def _keep_and_replay() -> tuple[_Keep, _Replay]:
    """Contexts of one layer's forward and of its second run, for layers whose code is not known.

    Two dispatch modes see every operation, which takes Python several times as long as the layer itself.

    torch's own (`create_selective_checkpoint_contexts`) demand that both runs are the same operation by
    operation, which ZeRO-3, whose hooks gather and free parameters between them, does not grant.
    """
    kept: _Kept = defaultdict(deque)
    return _Keep(kept), _Replay(kept)


_Kept = defaultdict[Any, deque[Any]]
"""Results by operation, in the order of their calls."""


class _Result:
    """A kept tensor; detached, or the graph that autograd hangs on the result would be kept with it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Below autograd, where a view would have a version counter of its own.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor, self.version = tensor.detach(), tensor._version

    def value(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a matrix product's result was changed in place after it had been kept for backward: choose "
                "model.activation_checkpointing none or full"
            )
        return self.tensor


class _Keep(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_kept(func, args):
            self.kept[func].append(tree_map_only(torch.Tensor, _Result, out))
        return out


class _Replay(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(func, args):
            return func(*args, **(kwargs or {}))
        return tree_map_only(_Result, _Result.value, self.kept[func].popleft())
