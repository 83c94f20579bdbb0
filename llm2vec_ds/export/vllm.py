"""Finds the options that make vLLM attend in both directions, as the encoder does.

vLLM 0.32.0 reads `is_causal` for a few model types only. For all others it uses causal attention without a
warning. The types listed here were run on a CPU (`tests/serving/test_vllm_types.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llm2vec_ds.model.bidirectional import is_causal

READS_IS_CAUSAL = frozenset({"llama", "mistral", "ministral3", "phi3", "qwen2", "qwen3", "gemma3_text"})
"""Model types for which vLLM's own code reads the flag."""
READ_BY_TRANSFORMERS = frozenset({"gemma", "gemma2"})
"""Model types that are right if vLLM runs transformers' code, which reads `use_bidirectional_attention`."""
MIXED_WINDOWS_REFUSED = frozenset({"qwen2", "qwen3"})


@dataclass(frozen=True)
class Start:
    """Options of `vllm serve` for this encoder; or the reason why vLLM cannot serve it."""

    options: dict[str, Any]
    refusal: str | None = None

    @property
    def line(self) -> str:
        """The options as typed in a shell, each with a space before it."""
        return "".join(
            f" --{name.replace('_', '-')} {_quoted(value)}" for name, value in self.options.items()
        )


def start_of(config: Any, max_tokens: int) -> Start:
    """Returns the options for a trunk's config and texts of up to `max_tokens` tokens."""
    kind = config.model_type
    if is_causal(config) is not False:
        return Start({})
    if kind not in READS_IS_CAUSAL | READ_BY_TRANSFORMERS:
        return Start({}, f"vLLM is not known to run model type {kind!r} with bidirectional attention")
    options: dict[str, Any] = {"model_impl": "transformers"} if kind in READ_BY_TRANSFORMERS else {}
    layers = _layer_types(config)
    if kind in MIXED_WINDOWS_REFUSED and len(set(layers)) > 1:
        return Start({}, f"vLLM does not load {kind!r} with a sliding window in only some of its layers")
    window = getattr(config, "sliding_window", None)
    counts_otherwise = kind != "gemma3_text" and "sliding_attention" in layers
    if counts_otherwise and window is not None and window < max_tokens:
        # In transformers a token sees `window` tokens on each side. In vLLM it sees one less.
        options["hf_overrides"] = {"sliding_window": window + 1}
    return Start(options)


def vllm_notes(config: Any, max_tokens: int) -> list[str]:
    """Returns notes for serving the export with vLLM, each a sentence."""
    start = start_of(config, max_tokens)
    if start.refusal is not None:
        return [f"{start.refusal}: serve with sentence-transformers, which gives the encoder's vectors."]
    if start.options:
        return [f"Start vLLM with these options: vllm serve FOLDER --runner pooling{start.line}"]
    return []


def _layer_types(config: Any) -> list[str]:
    """Returns the kind of each layer. A config with a window and no list of kinds has it in all layers."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds
    return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]


def _quoted(value: Any) -> str:
    return value if isinstance(value, str) else f"'{json.dumps(value)}'"
