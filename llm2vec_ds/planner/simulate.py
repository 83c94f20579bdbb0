"""One micro-batch forward and backward on the meta device: what is held for backward, and the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.encoder.encoder import trunk_hidden_states
from llm2vec_ds.objectives.registry import objective_of
from llm2vec_ds.planner.meta_model import META, MetaModel
from llm2vec_ds.recipe.recipe import Recipe


@dataclass(frozen=True)
class PassBytes:
    """Of one micro-batch, parameters and their gradients left out.

    Attributes:
        activations: held between forward and backward.
        peak: the most at any moment, activations included; the language head's logits too.
        logits: what the head holds at most beyond its own result, part of `peak` where it is the largest.
    """

    activations: int
    peak: int
    logits: int = 0


COPIES_ITS_INPUT = (torch.ops.aten.logsumexp.default,)
"""Its kernel allocates where a dispatch mode does not see it."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of meta tensors that are alive, by storage, while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 1  # "is this no packed stream?", asked by some models before they make a mask
        out = func(*args, **(kwargs or {}))
        if func in COPIES_ITS_INPUT:
            self.peak = max(self.peak, self.now + args[0].untyped_storage().nbytes())
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                self._note(leaf.untyped_storage())
        return out

    def known(self, storages: Iterator[torch.UntypedStorage]) -> None:
        """These are counted elsewhere."""
        for storage in storages:
            self._seen[storage._cdata] = None

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.finalize(storage, self._free, key, n_bytes)

    def _free(self, key: int, n_bytes: int) -> None:
        self._seen.pop(key, None)
        self.now -= n_bytes

    @contextmanager
    def fresh_peak(self) -> Iterator[None]:
        before, self.peak = self.peak, self.now
        yield
        self.last, self.peak = self.peak - self.now, max(before, self.peak)


def simulate(model: MetaModel, recipe: Recipe, n_texts: int, tokens_per_text: int) -> PassBytes:
    """Forward and backward of `n_texts` equally long texts, as a stage runs them."""
    stream, pooled = _batches(n_texts, tokens_per_text)
    model.whole.train()
    live = LiveBytes()
    live.known(tensor.untyped_storage() for tensor in (*model.whole.parameters(), *model.whole.buffers()))
    # Gradients have their own line, and under ZeRO they leave as they come.
    hooks = [
        p.register_post_accumulate_grad_hook(_drop_gradient)
        for p in model.whole.parameters()
        if p.requires_grad
    ]
    try:
        with live:
            hidden_TD = trunk_hidden_states(model.trunk, stream)
            with live.fresh_peak():
                result = objective_of(recipe).planned_outcome(hidden_TD, pooled, model.head, recipe)
            logits = live.last
            del hidden_TD
            activations = live.now
            result.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return PassBytes(activations, live.peak, logits if model.head is not None else 0)


def _batches(n_texts: int, tokens_per_text: int) -> tuple[PackedBatch, PackedBatch]:
    """One whose text boundaries are real, for an attention that reads them, and one all on meta."""
    n_tokens = n_texts * tokens_per_text
    with META:
        ids = torch.empty(n_tokens, dtype=torch.int64)
        mask = torch.empty(n_tokens, dtype=torch.bool)
    bounds = torch.arange(0, n_tokens + 1, tokens_per_text, dtype=torch.int32)
    stream = PackedBatch(ids, ids, bounds, tokens_per_text, mask)
    return stream, PackedBatch(ids, ids, bounds.to(META), tokens_per_text, mask)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
