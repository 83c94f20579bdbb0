"""Dropout of the adapters' inputs. Each input has one mask, and the layers that read it share it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from llm2vec_kernels.row_ops.dropout import Masks, drop
from llm2vec_kernels.seeds import Seeds
from torch import nn

from llm2vec_ds.model.origins import note_drop

Dropped = tuple[torch.Tensor, torch.Tensor, float]
"""The input with zeros where the mask drops (without gradient), the mask, and the probability."""


class InputDropout:
    """Gives each input tensor one dropout mask. q, k and v read one tensor, gate and up another.

    peft draws one mask for each layer. Here layers that read the same input share its mask, because drawing a
    mask takes as long as a small matrix product. The memory of the input shows which layers share it. So no
    layer names are needed.
    """

    def __init__(self) -> None:
        self.masks_of: Callable[[float], Masks] = Masks
        self._seeds: Seeds | None = None
        self._masks: Masks | None = None
        self._last: tuple[torch.Tensor, Dropped] | None = None

    def of(self, x: torch.Tensor, p: float) -> Dropped:
        """Returns x with dropout. Reuses the last mask if `x` has the memory and shape of the last call's."""
        if self._masks is None or self._masks.p != p:
            self._masks = self.masks_of(p) if self._seeds is None else Masks(p, self._seeds)
            self._last = None
        if self._last is None or not _is_same(self._last[0], x):
            # Inputs are compared by address, since under ZeRO-3 each layer sees another view of the input.
            # The input is held until the next one, so that no other tensor can get its address meanwhile.
            held = x.detach()
            mask = self._masks.next_for(x)
            dropped = note_drop(drop(held, p, mask), x, partial(drop, p=p), mask)
            self._last = held, (dropped, mask, p)
        return self._last[1]

    def forget(self, *_: Any) -> None:
        """Drops masks and seeds. The next mask depends on torch's generator alone."""
        self._seeds = self._masks = self._last = None

    def _take_seeds(self, _: nn.Module, args: Any, options: dict[str, Any]) -> None:
        self._seeds = options.get("dropout_seeds")

    def follow(self, trunk: nn.Module) -> None:
        """Takes the `dropout_seeds` of each pass of the trunk, and drops all masks at the end of the pass.

        So two passes never share a mask.
        """
        trunk.register_forward_pre_hook(self._take_seeds, with_kwargs=True)
        trunk.register_forward_hook(self.forget, always_call=True)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
