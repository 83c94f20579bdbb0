"""Bidirectional attention in any decoder that transformers lets become an encoder, and refusal of the rest.

transformers ≥ 5.2 reads `config.is_causal` on every forward pass of a trunk whose `forward` carries the
`merge_with_config_defaults` decorator, for the mask and for the attention function. The attribute has to
stand on the config object itself: passed as a keyword to `from_pretrained` it is dropped by any config
class that does not declare it, and the model stays causal without a word.
"""

from __future__ import annotations

from typing import Any

from llm2vec_ds.errors import UserError

HOOK = "merge_with_config_defaults"
OWN_FLAG = "use_bidirectional_attention"


def with_causal(config: Any, causal: bool) -> Any:
    """The config of the same model, causal or bidirectional; build the model from what is returned.

    A config that narrows its sliding window under a flag of its own (Gemma 3's
    `use_bidirectional_attention`) gets that flag and no other: it is what servers of such models read, and
    with both flags the window would differ by one from theirs.
    """
    if _narrows_its_window(config):
        return _flagged(config, not causal)
    config.is_causal = causal
    return config


def is_causal(config: Any) -> bool | None:
    """What a config says; None where it says nothing, which transformers takes for causal.

    Raises:
        UserError: it says neither true nor false.
    """
    if _narrows_its_window(config):
        return not getattr(config, OWN_FLAG)
    value: bool | None = getattr(config, "is_causal", None)
    if value not in (None, True, False):
        raise UserError(f"config.json says is_causal={value!r}: write true or false")
    return value


def _narrows_its_window(config: Any) -> bool:
    """Found by trying: Gemma and Gemma 2 have the flag too, but there it moves neither window nor mask."""
    if not hasattr(config, OWN_FLAG) or getattr(config, "sliding_window", None) is None:
        return False
    return bool(_flagged(config, True).sliding_window != _flagged(config, False).sliding_window)


def _flagged(config: Any, bidirectional: bool) -> Any:
    return type(config).from_dict({**config.to_dict(), OWN_FLAG: bidirectional})


def check_can_be_bidirectional(trunk: Any) -> None:
    """Refuses a trunk whose attention cannot be switched.

    Raises:
        UserError: `trunk.forward` lacks transformers' hook (falcon, bloom, mpt, gptj, codegen …).
    """
    check_class_can_be_bidirectional(type(trunk), trunk.config.model_type)


def check_class_can_be_bidirectional(trunk_class: type, model_type: str) -> None:
    """The same before anything is built or read: a class without the hook often knows nothing of other
    attention functions either, and would die of that first."""
    if not _has_hook(trunk_class.forward):  # type: ignore[attr-defined]
        raise UserError(
            f"model type {model_type!r} cannot be made bidirectional: transformers gives "
            f"{trunk_class.__name__} no is_causal switch. Use a type that has it, such as llama, mistral, "
            "qwen3 or gemma, or a newer transformers"
        )


def _has_hook(function: Any) -> bool:
    """Is one of the decorators around `function` the hook? Each leaves its code object's name."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and code.co_qualname.startswith(f"{HOOK}."):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
