"""Finds the language model inside a checkpoint that also takes images or sound."""

from __future__ import annotations

from typing import Any

from torch import nn

from llm2vec_ds.errors import UserError


def text_part(config: Any) -> tuple[Any, str | None]:
    """Returns the config of the language model, and the name under which `config` holds it.

    The name is None if `config` is itself that of the language model.

    Raises:
        UserError: there are several language models. Or transformers has no class for the language model
            alone, so it could not be saved.
    """
    from transformers import MODEL_MAPPING

    try:
        text = config.get_text_config()
    except ValueError:
        raise UserError(
            f"model type {config.model_type!r} cannot be an encoder: it holds several text models. Use a "
            "type that docs/architectures.md lists as exact"
        ) from None
    if text is config:
        return config, None
    if type(text) not in MODEL_MAPPING:
        raise UserError(
            f"model type {config.model_type!r} cannot be an encoder: transformers has no class for its text "
            f"model {text.model_type!r} alone. Use a type that docs/architectures.md lists as exact"
        )
    return text, next(name for name in config.sub_configs if getattr(config, name, None) is text)


def with_text_part(config: Any, name: str | None, text: Any) -> Any:
    """Returns the same config with another text config."""
    if name is None:
        return text
    setattr(config, name, text)
    return config


def class_of_whole(config: Any) -> Any:
    """Returns the class that reads all weights of a checkpoint that holds more than a text model.

    Raises:
        UserError: transformers has no such class.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    for mapping in (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    raise UserError(
        f"model type {config.model_type!r} cannot be an encoder: transformers cannot read text with it"
    )


def text_model_in(model: nn.Module, text: Any) -> Any:
    """Returns the part of `model` that is the trunk of its language model. `text` is the config of that part.

    Raises:
        UserError: the model has no such part.
    """
    from transformers import MODEL_MAPPING

    kind = MODEL_MAPPING[type(text)]
    for part in model.modules():
        if isinstance(part, kind):
            return part
    raise UserError(f"{type(model).__name__} holds no {kind.__name__}: it cannot be an encoder")
