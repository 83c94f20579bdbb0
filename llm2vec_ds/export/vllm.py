"""How vLLM is started so that it attends as an encoder does.

vLLM 0.32.0 reads `is_causal` for a few model types only. For all others it attends to the past alone, and
says nothing. What is listed here was run on a CPU (`tests/serving/test_vllm_types.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llm2vec_ds.model.bidirectional import is_causal

READS_IS_CAUSAL = frozenset({"llama", "mistral", "ministral3", "phi3", "qwen2", "qwen3", "gemma3_text"})
"""By vLLM's own code for the type."""
READ_BY_TRANSFORMERS = frozenset({"gemma", "gemma2"})
"""Right where vLLM runs transformers' code, which reads `use_bidirectional_attention`."""
MIXED_WINDOWS_REFUSED = frozenset({"qwen2", "qwen3"})


@dataclass(frozen=True)
class Start:
    """Options of `vllm serve` beside the folder; or why none makes it serve this encoder."""

    options: dict[str, Any]
    refusal: str | None = None

    @property
    def line(self) -> str:
        """As typed in a shell, with a blank before each."""
        return "".join(
            f" --{name.replace('_', '-')} {_quoted(value)}" for name, value in self.options.items()
        )


def start_of(config: Any, max_tokens: int) -> Start:
    """For a trunk's config and texts of up to `max_tokens` tokens."""
    kind = config.model_type
    if is_causal(config) is not False:
        return Start({})
    if kind not in READS_IS_CAUSAL | READ_BY_TRANSFORMERS:
        return Start({}, f"vLLM is not known to attend to both sides in model type {kind!r}")
    options: dict[str, Any] = {"model_impl": "transformers"} if kind in READ_BY_TRANSFORMERS else {}
    layers = _layer_types(config)
    if kind in MIXED_WINDOWS_REFUSED and len(set(layers)) > 1:
        return Start({}, f"vLLM does not load {kind!r} with a window in some of its layers")
    window = getattr(config, "sliding_window", None)
    counts_otherwise = kind != "gemma3_text" and "sliding_attention" in layers
    if counts_otherwise and window is not None and window < max_tokens:
        # transformers lets a token see `window` tokens on each side, vLLM one less.
        options["hf_overrides"] = {"sliding_window": window + 1}
    return Start(options)


def vllm_notes(config: Any, max_tokens: int) -> list[str]:
    """What to know before one serves the export with vLLM, each as a sentence."""
    start = start_of(config, max_tokens)
    if start.refusal is not None:
        return [f"{start.refusal}: serve with sentence-transformers, which gives the encoder's vectors."]
    if start.options:
        return [f"vLLM needs this: vllm serve FOLDER --runner pooling{start.line}"]
    return []


def _layer_types(config: Any) -> list[str]:
    """Of each layer; a config with a window and no list has it in all layers."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds
    return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]


def _quoted(value: Any) -> str:
    return value if isinstance(value, str) else f"'{json.dumps(value)}'"
