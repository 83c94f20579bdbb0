"""Bidirectional attention in any decoder that transformers lets become an encoder, and refusal of the rest.

transformers ≥ 5.2 reads `config.is_causal` on every forward pass of a trunk whose `forward` carries the
`merge_with_config_defaults` decorator, for the mask and for the attention function. The attribute has to
stand on the config object itself: passed as a keyword to `from_pretrained` it is dropped by any config
class that does not declare it, and the model stays causal without a word.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError

from llm2vec_ds.errors import UserError

HOOK = "merge_with_config_defaults"
OWN_FLAG = "use_bidirectional_attention"
OWN_VALUES = (True, "all")


def with_causal(config: Any, causal: bool) -> Any:
    """The config of the same model, causal or bidirectional; build the model from what is returned.

    A config that narrows its sliding window under a flag of its own (`use_bidirectional_attention`: true in
    Gemma 3, `all` in Gemma 4) gets that flag and no other: it is what servers of such models read, and with
    both flags the window would differ by one from theirs.
    """
    both_ways = _own_flag(config)
    if both_ways is None:
        config.is_causal = causal
        return config
    if not causal:
        return _flagged(config, both_ways)
    config = _flagged(config, None)
    config.is_causal = True
    return config


def is_causal(config: Any) -> bool | None:
    """What a config says; None where it says nothing, which transformers takes for causal.

    Raises:
        UserError: it says neither true nor false.
    """
    both_ways = _own_flag(config)
    if both_ways is not None and getattr(config, OWN_FLAG) == both_ways:
        return False
    value: bool | None = getattr(config, "is_causal", None)
    if value not in (None, True, False):
        raise UserError(f"config.json says is_causal={value!r}: write true or false")
    if value is None and both_ways is not None and _has_no_head(config):
        return True  # version 0.1 wrote nothing more of a causal encoder
    return value


def has_own_flag(config: Any) -> bool:
    """Whether a flag of its own says that it is bidirectional, and `is_causal` does not."""
    return _own_flag(config) is not None


def _has_no_head(config: Any) -> bool:
    classes: list[str] = getattr(config, "architectures", None) or []
    return bool(classes) and not any("For" in name for name in classes)


def _own_flag(config: Any) -> bool | str | None:
    """The value of a config's own flag that makes it bidirectional; None where `is_causal` does.

    Found by trying: Gemma and Gemma 2 have the flag too, but there it moves neither window nor mask.
    """
    if not hasattr(config, OWN_FLAG) or getattr(config, "sliding_window", None) is None:
        return None
    for value in OWN_VALUES:
        try:
            windows = {_flagged(config, flag).sliding_window for flag in (value, None)}
        except StrictDataclassFieldValidationError:
            continue
        return value if len(windows) == 2 else None
    return None


def _flagged(config: Any, value: bool | str | None) -> Any:
    """`is_causal` goes: the flag sets it where it has to be."""
    values = {key: kept for key, kept in config.to_dict().items() if key != "is_causal"}
    return type(config).from_dict({**values, OWN_FLAG: value})


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
