"""Which activations are kept for backward, and which are computed again (activation checkpointing)."""

from __future__ import annotations

from collections import defaultdict, deque
from functools import cache
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Recomputation = Literal["none", "selective", "full"]


def recompute_activations(trunk: Any, which: Recomputation) -> None:
    """Makes a transformers trunk run each layer again in backward, in training mode.

    Args:
        which: `none`; `full`, whole layers; or `selective`, all but matrix products and attention, whose
            results are kept: norms, rotary embeddings and activation functions take little time and half
            of the memory (the name is that of Korthikanti et al., 2022, arXiv 2205.05198, who recompute
            the scores of attention, which fused attention does not hold).
    """
    if which == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if which == "selective":
        options["context_fn"] = _keep_and_replay
    trunk.activation_checkpointing_enable(options)


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
    """Contexts of one layer's forward and of its second run.

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
