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


def set_causal(config: Any, causal: bool) -> None:
    """Makes the model that is built from `config`, or that holds it, causal or bidirectional."""
    config.is_causal = causal


def check_can_be_bidirectional(trunk: Any) -> None:
    """Refuses a trunk whose attention cannot be switched.

    Raises:
        UserError: `trunk.forward` lacks transformers' hook (falcon, bloom, mpt, gptj, codegen …).
    """
    if not _has_hook(type(trunk).forward):
        raise UserError(
            f"model type {trunk.config.model_type!r} cannot be made bidirectional: transformers gives "
            f"{type(trunk).__name__} no is_causal switch. Use a type that has it, such as llama, mistral, "
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
