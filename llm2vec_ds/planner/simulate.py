"""Counts the bytes of one micro-batch: what it holds for backward, and its peak.

The micro-batch runs forward and backward on the meta device, where a tensor has a shape but no memory. A
dispatch mode adds up the bytes that living tensors would take.
"""

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
    """Bytes of one micro-batch, without parameters and their gradients.

    Attributes:
        activations: bytes held between forward and backward.
        peak: the most bytes at any moment, activations and the language head's logits included.
        logits: the most bytes that the head holds besides its result. They are part of `peak` if the peak
            falls into the head.
    """

    activations: int
    peak: int
    logits: int = 0


COPIES_ITS_INPUT = (torch.ops.aten.logsumexp.default,)
"""Operations whose kernel allocates a copy of the input. A dispatch mode cannot see inside a kernel."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living meta tensors while the mode is on.

    It counts storages, not tensors: a view shares the storage of its base and takes no bytes of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            # Some models read a tensor's value before they make a mask, to ask "is this no packed stream?".
            # A meta tensor has no value, so the answer is always 1: yes.
            return 1
        out = func(*args, **(kwargs or {}))
        if func in COPIES_ITS_INPUT:
            self.peak = max(self.peak, self.now + args[0].untyped_storage().nbytes())
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                self._note(leaf.untyped_storage())
        return out

    def known(self, storages: Iterator[torch.UntypedStorage]) -> None:
        """Leaves out these storages: they are counted elsewhere."""
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
        """Sets `last` to the peak inside the block, above the bytes that still live at its end."""
        before, self.peak = self.peak, self.now
        yield
        self.last, self.peak = self.peak - self.now, max(before, self.peak)


def simulate(model: MetaModel, recipe: Recipe, n_texts: int, tokens_per_text: int) -> PassBytes:
    """Runs forward and backward of `n_texts` equally long texts, as a stage does."""
    stream, pooled = _batches(n_texts, tokens_per_text)
    model.whole.train()
    live = LiveBytes()
    live.known(tensor.untyped_storage() for tensor in (*model.whole.parameters(), *model.whole.buffers()))
    # `States.gradients` counts parameter gradients, so each one is dropped as soon as it is complete.
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
    """Returns the batch twice: for the trunk, and for head or pooling.

    The first has real text boundaries, because an attention may read their values. The second is all on meta.
    """
    n_tokens = n_texts * tokens_per_text
    with META:
        ids = torch.empty(n_tokens, dtype=torch.int64)
        mask = torch.empty(n_tokens, dtype=torch.bool)
    bounds = torch.arange(0, n_tokens + 1, tokens_per_text, dtype=torch.int32)
    stream = PackedBatch(ids, ids, bounds, tokens_per_text, mask)
    return stream, PackedBatch(ids, ids, bounds.to(META), tokens_per_text, mask)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
