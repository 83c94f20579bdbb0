"""Decides whether a config can become a trunk, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.bidirectional import check_class_can_be_bidirectional, is_causal, with_causal
from llm2vec_ds.model.probe.probe import check_config
from llm2vec_ds.model.text_part import text_part


@dataclass(frozen=True)
class Accepted:
    """A config that can become a trunk.

    Attributes:
        config: the config of the trunk, causal or bidirectional.
        part: the name under which the whole config holds it. None if it is the whole config.
        causal: whether the trunk will be causal.
        shown: a miniature passed the checks. Otherwise the loaded trunk must pass them.
    """

    config: Any
    part: str | None
    causal: bool
    shown: bool


def accepted(whole: Any, causal: bool | None, *, trust_remote_code: bool = False) -> Accepted:
    """Returns the config of the trunk.

    Args:
        whole: the config of a checkpoint.
        causal: None keeps what the config says. If it says nothing, the trunk is bidirectional.

    Raises:
        UserError: no trunk can be made of it, or its vectors would be wrong. Names the type and the reason.
    """
    from transformers import MODEL_MAPPING

    config, part = text_part(whole)
    n_layers = getattr(config, "num_hidden_layers", None)
    if n_layers is not None and n_layers < 1:
        raise UserError("its config.json gives it no layer: check num_hidden_layers")
    causal = bool(is_causal(config)) if causal is None else causal
    if type(config) in MODEL_MAPPING:
        _check_class(MODEL_MAPPING[type(config)], config.model_type, causal)
    elif _is_of_transformers(config):
        raise UserError(
            f"model type {config.model_type!r} cannot be an encoder: transformers has no class for it "
            "without a head. Use a type that docs/architectures.md lists as exact"
        )
    shown = check_config(config, causal, trust_remote_code=trust_remote_code)
    return Accepted(with_causal(config, causal), part, causal, shown)


def _is_of_transformers(config: Any) -> bool:
    return type(config).__module__.startswith("transformers.")


def _check_class(trunk_class: Any, model_type: str, causal: bool) -> None:
    if not causal:
        check_class_can_be_bidirectional(trunk_class, model_type)
    if not trunk_class._supports_attention_backend:
        raise UserError(
            f"model type {model_type!r} allows only its own attention function: use a type such as llama, "
            "mistral, qwen3 or gemma, or a newer transformers"
        )
