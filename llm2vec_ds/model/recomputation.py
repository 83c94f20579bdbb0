"""Decides which activations are kept for backward and which are recomputed (activation checkpointing)."""

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

from llm2vec_ds.model.fused_layers import GATED_UNITS, NORMS, recompute_in_backward
from llm2vec_ds.model.input_dropout import InputDropout
from llm2vec_ds.model.lora_linear import LoraLinear

Recomputation = Literal["none", "selective", "full"]


def recompute_activations(trunk: Any, which: Recomputation) -> str:
    """Makes a transformers trunk recompute activations in backward, in training mode.

    Args:
        which: `none` keeps everything. `full` recomputes whole layers. `selective` keeps matrix products and
            attention. It recomputes norms and gated units, and operation by operation also rotary embeddings.
            These take little time and half of the memory. The name `selective` is from Korthikanti et al.,
            2022, arXiv 2205.05198. They recompute the scores of attention, which fused attention does not
            hold.

    Returns:
        What was done, for a log.
    """
    if which == "none":
        return "none"
    if which == "selective" and layers_keep_origins(trunk):
        again = recompute_in_backward(trunk)
        return "selective: backward recomputes " + ", ".join(f"{n} {kind}" for kind, n in again.items())
    dropouts = {layer.dropouts for layer in trunk.modules() if isinstance(layer, LoraLinear)}
    contexts = _keep_and_replay if which == "selective" else lambda: (nullcontext(), nullcontext())
    trunk.activation_checkpointing_enable(
        {
            "use_reentrant": False,
            "context_fn": lambda: tuple(_Fresh(dropouts, context) for context in contexts()),
        }
    )
    why = "more trains than plain adapters, or a layer has unknown parts"
    return "full" if which == "full" else f"selective, operation by operation: {why}"


def runs_layers_twice(trunk: Any) -> bool:
    """Says whether torch's checkpointing runs layers again in backward, with torch's generator reset."""
    return any(getattr(part, "gradient_checkpointing", False) for part in trunk.modules())


def layers_keep_origins(trunk: Any) -> bool:
    """Says whether backward can recompute norms and gated units from their origins (`origins.py`).

    Every adapter must be a plain `LoraLinear`, since only that knows origins. Nothing but adapters may train.
    There must be a known norm and a known gated unit.
    """
    adapted = [layer for layer in trunk.modules() if isinstance(layer, LoraLayer)]
    if not adapted or not all(isinstance(layer, LoraLinear) and layer.is_plain() for layer in adapted):
        return False
    if any(p.requires_grad for name, p in trunk.named_parameters() if ".lora_" not in name):
        return False
    kinds = {getattr(module, "fused_kind", None) for module in trunk.modules()}
    return not kinds.isdisjoint(NORMS) and not kinds.isdisjoint(GATED_UNITS)


class _Fresh(AbstractContextManager[None]):
    """Makes a layer's dropout depend on torch's generator alone, in forward and in the second run.

    torch resets its generator before the second run. Masks left over from another layer would differ.
    """

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
"""Maps a matrix product to the number of the argument whose last dimension is summed over."""
_CHEAP_SUM = 256
"""A product that sums over at most this many numbers is recomputed. It takes little time for a large result:
an adapter's update, or the scores of attention."""
_FUSED = frozenset(
    f"{name}.default"
    for name in (
        "llm2vec_ds.lora_linear",
        "mkldnn._linear_pointwise",
        "llm2vec.cpu_attention",
        "llm2vec.flash_attention",
        "llm2vec_ds.attention_shapes",  # stands for attention in a plan
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
    )
)
"""Operations whose results are kept, whatever their size. Attention by any other operation runs again."""


def _is_kept(func: Any, args: tuple[Any, ...]) -> bool:
    factor = _FACTOR.get(func)
    if factor is None:
        return _is_fused(func)
    return int(args[factor].shape[-1]) > _CHEAP_SUM


@cache
def _is_fused(func: Any) -> bool:
    return str(func) in _FUSED  # by name: not every torch has all of them


def _keep_and_replay() -> tuple[_Keep, _Replay]:
    """Returns contexts for a layer's forward and its second run, for layers whose code is not known.

    Two dispatch modes see every operation. In Python this takes several times as long as the layer itself.

    torch has such contexts too (`create_selective_checkpoint_contexts`). But both runs must then be the same,
    operation by operation. Under ZeRO-3 they are not: its hooks gather and free parameters in between.
    """
    kept: _Kept = defaultdict(deque)
    return _Keep(kept), _Replay(kept)


_Kept = defaultdict[Any, deque[Any]]
"""Kept results by operation, in the order of the calls."""


class _Result:
    """A kept tensor. It is detached. Otherwise the autograd graph of the result would be kept with it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # A dispatch mode runs below autograd, where a detached view would have its own version counter. Then
        # a change in place would not be noticed.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor, self.version = tensor.detach(), tensor._version

    def value(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a matrix product's result was changed in place after it was kept for backward: choose "
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
