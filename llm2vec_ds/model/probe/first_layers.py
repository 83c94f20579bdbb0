"""Shortens a loaded trunk to its first layers while it is checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llm2vec_ds.model.probe.miniature import layer_kind, layers_of


@contextmanager
def first_layers(trunk: Any) -> Iterator[None]:
    """Keeps only the first layers of the trunk in this context, so many that each kind of layer is there.

    The first ones stay, not a selection: some types choose a layer's mask by its place. Keeps all layers if
    they are in no list.
    """
    layers = layers_of(trunk)
    kinds = [layer_kind(layer) for layer in layers]
    n_first = max((kinds.index(kind) for kind in set(kinds)), default=0) + 2
    held = _holder(trunk, layers) if layers else None
    if held is None:
        yield
        return
    parent, name = held
    whole = getattr(parent, name)
    setattr(parent, name, whole[:n_first])
    try:
        yield
    finally:
        setattr(parent, name, whole)


def _holder(trunk: nn.Module, layers: list[nn.Module]) -> tuple[nn.Module, str] | None:
    """Returns the module that holds the list of layers, and the list's name in it."""
    for parent in trunk.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and list(child) == layers:
                return parent, name
    return None
