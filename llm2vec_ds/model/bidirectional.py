"""Makes decoders bidirectional if transformers allows it, and refuses the others.

transformers ≥ 5.2 reads `config.is_causal` on every forward pass, for the mask and the attention function.
The trunk's `forward` must have the decorator `merge_with_config_defaults`.

The attribute must be set on the config object itself. As a keyword of `from_pretrained` it is dropped by any
config class that does not declare it. The model then stays causal, and nothing says so.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError

from llm2vec_ds.errors import UserError

HOOK = "merge_with_config_defaults"
OWN_FLAG = "use_bidirectional_attention"
OWN_VALUES = (True, "all")


def with_causal(config: Any, causal: bool) -> Any:
    """Returns the config of the same model, causal or bidirectional. Build the model from this config.

    Some configs have their own flag, which also narrows the sliding window (`use_bidirectional_attention`:
    true in Gemma 3, `all` in Gemma 4). To be bidirectional, they get that flag and not `is_causal`.
    Servers of such models read the flag. With both flags the window would differ by one from theirs.
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
    """Says whether a config is causal. None if it does not say, which transformers takes as causal.

    Raises:
        UserError: `is_causal` is neither true nor false.
    """
    both_ways = _own_flag(config)
    if both_ways is not None and getattr(config, OWN_FLAG) == both_ways:
        return False
    value: bool | None = getattr(config, "is_causal", None)
    if value not in (None, True, False):
        raise UserError(f"config.json says is_causal={value!r}: write true or false")
    if value is None and both_ways is not None and _has_no_head(config):
        return True  # version 0.1 wrote no flag for a causal encoder
    return value


def has_own_flag(config: Any) -> bool:
    """Says whether a config's own flag, and not `is_causal`, makes it bidirectional."""
    return _own_flag(config) is not None


def _has_no_head(config: Any) -> bool:
    classes: list[str] = getattr(config, "architectures", None) or []
    return bool(classes) and not any("For" in name for name in classes)


def _own_flag(config: Any) -> bool | str | None:
    """Returns the value of a config's own flag that makes it bidirectional. None if `is_causal` does.

    The value is found by trying whether it changes the window. Gemma and Gemma 2 have the flag too, but there
    it changes neither window nor mask.
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
    """Returns the config with its own flag set and without `is_causal`, which the flag sets if needed."""
    values = {key: kept for key, kept in config.to_dict().items() if key != "is_causal"}
    return type(config).from_dict({**values, OWN_FLAG: value})


def check_can_be_bidirectional(trunk: Any) -> None:
    """Refuses a trunk that cannot be made bidirectional.

    Raises:
        UserError: `trunk.forward` lacks transformers' hook (falcon, bloom, mpt, gptj, codegen …).
    """
    check_class_can_be_bidirectional(type(trunk), trunk.config.model_type)


def check_class_can_be_bidirectional(trunk_class: type, model_type: str) -> None:
    """Checks the same before anything is built or read.

    A class without the hook often does not know other attention functions either. Building it would fail
    because of that first.
    """
    if not _has_hook(trunk_class.forward):  # type: ignore[attr-defined]
        raise UserError(
            f"model type {model_type!r} cannot be made bidirectional: transformers gives "
            f"{trunk_class.__name__} no is_causal switch. Use a type that has it, such as llama, mistral, "
            "qwen3 or gemma, or a newer transformers"
        )


def _has_hook(function: Any) -> bool:
    """Says whether one of the decorators around `function` is the hook. The code object's name shows it."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and code.co_qualname.startswith(f"{HOOK}."):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
