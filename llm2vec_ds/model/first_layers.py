"""Cuts a trunk after its first layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from llm2vec_ds.errors import UserError


def keep_first_layers(trunk: Any, n_layers: int) -> None:
    """Lets the trunk end after `n_layers` layers, and without its final norm. What comes later is dropped.

    Its output is then what transformers calls `hidden_states[n_layers]`, except after the last layer: there
    transformers applies the final norm, and this does not.

    Raises:
        UserError: the trunk has fewer layers, or they have other names than `layers` and `norm`.
    """
    check_can_be_cut(trunk)
    if n_layers > len(trunk.layers):
        raise UserError(f"layer {n_layers} was asked for, and the model has {len(trunk.layers)}")
    trunk.layers, trunk.norm = trunk.layers[:n_layers], nn.Identity()


def check_can_be_cut(trunk: Any) -> None:
    """Raises UserError if the trunk's layers and final norm have other names than `layers` and `norm`."""
    layers, norm = getattr(trunk, "layers", None), getattr(trunk, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise UserError(
            f"{type(trunk).__name__} has no `layers` and `norm`, so it cannot be cut: take one that has them"
        )
