"""Makes the numbers in a model's config small. The model stays of the same kind, at a thousandth of the size.

A config says in one dictionary what a model is made of (layer types, gates, scaling) and how large it is.
Only the sizes are changed. The words in a key say what size it is. They are those of transformers' configs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

VOCABULARY, WINDOW, CHUNK, ROPE_SWITCH, POSITIONS = 64, 16, 8, 12, 24
"""Every limit is smaller than the longest text of the checks. Window and chunk are larger than SHORT."""

LIMITS = (
    (re.compile(r"topk_block"), 1),
    (re.compile(r"vocab"), VOCABULARY),
    (re.compile(r"original_max_position"), ROPE_SWITCH),
    (re.compile(r"max_position|max_seq|n_positions|n_ctx|seq_length|max_length"), POSITIONS),
    (re.compile(r"window(?!_layers)"), WINDOW),
    (re.compile(r"chunk|block_size|index_topk|floor_scale"), CHUNK),
)
WIDTHS = re.compile(
    r"size|(^|_)dims?($|_)|rank|width|d_model|d_ff|n_embd|n_inner|d_inner|d_head|d_state|units|channels|latent"
)
NO_WIDTHS = re.compile(r"kernel|conv|patch|image|batch|group_size|pool")
COUNTS = re.compile(r"(?<!per)_layers?$|^layers$|^first_k|_layers_")
"""Keys that count layers. They count the first layers, or the last ones if layers share something."""
EXPERTS = re.compile(r"experts?$|expert_num$|experts_num$")
CHOSEN = re.compile(r"per_tok|top_?k(?!_group)")
TOKENS = re.compile(r"token_(id|ids|index)$")
ROPE_LISTS = re.compile(r"(long|short)_factor$|mrope_section$")
OTHERS = ("architectures", "transformers_version", "quantization_config", "auto_map", "dtype")


@dataclass(frozen=True)
class Scale:
    """The layers that are kept, the number of all layers, and the divisor of widths."""

    layers: Sequence[int]
    n_layers: int
    width: int


def shrunk(config: Any, scale: Scale) -> dict[str, Any]:
    """Returns the dictionary of `config` with small limits and widths. Lists of layers hold the kept layers.

    Build the small config from the whole dictionary, so that checks across fields run.
    """
    values = {key: value for key, value in config.to_dict().items() if key not in OTHERS}
    n_experts = max(8, 2 * (values.get("n_group") or 1))
    return {key: _Shrinking(scale, n_experts).of(key, value) for key, value in values.items()}


@dataclass(frozen=True)
class _Shrinking:
    scale: Scale
    n_experts: int

    def of(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self._dictionary(value)
        if isinstance(value, list):
            return self._list(key, value)
        if isinstance(value, str) and "pattern" in key and len(value) == self.scale.n_layers:
            return "".join(value[i] for i in self.scale.layers)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            return value
        return self._count(key, value) if COUNTS.search(key) else self._number(key, value)

    def _dictionary(self, value: dict[Any, Any]) -> dict[Any, Any]:
        """Shrinks a dictionary. If its keys are numbers of layers, keeps those of the kept layers."""
        numbers = all(str(key).isdigit() and int(key) < self.scale.n_layers for key in value)
        if value and numbers and all(isinstance(part, dict) for part in value.values()):
            kept = {int(key): part for key, part in value.items()}
            layers = enumerate(self.scale.layers)
            return {new: self._dictionary(kept[old]) for new, old in layers if old in kept}
        return {key: self.of(str(key), part) for key, part in value.items()}

    def _list(self, key: str, value: list[Any]) -> list[Any]:
        if TOKENS.search(key):
            return [token % VOCABULARY if isinstance(token, int) else token for token in value]
        if ROPE_LISTS.search(key):
            return self._sections(value) if key.endswith("section") else value[:: self.scale.width]
        if len(value) == self.scale.n_layers:
            value = [value[i] for i in self.scale.layers]
        elif self._numbers_layers(value):
            return [new for new, old in enumerate(self.scale.layers) if old in value]
        return [self.of(key, part) for part in value]

    def _sections(self, value: list[int]) -> list[int]:
        """Shrinks the parts of a head by dividing their ends. So their sum becomes the small width."""
        ends = [end // self.scale.width for end in accumulate(value)]
        return [end - start for start, end in pairwise([0, *ends])]

    def _numbers_layers(self, value: list[Any]) -> bool:
        """Says whether this is a list of some layers' numbers."""
        whole = bool(value) and all(type(part) is int for part in value)
        return whole and value == sorted(set(value)) and value[0] >= 0 and value[-1] < self.scale.n_layers

    def _count(self, key: str, value: int) -> int:
        layers, n = self.scale.layers, self.scale.n_layers
        if "shared" in key:
            return sum(i >= n - value for i in layers)
        return sum(i < value for i in layers)

    def _number(self, key: str, value: int) -> int:
        if TOKENS.search(key):
            return value % VOCABULARY
        for pattern, limit in LIMITS:
            if pattern.search(key):
                return limit
        if CHOSEN.search(key):
            return min(value, self.n_experts // 2)
        if EXPERTS.search(key):
            return min(value, self.n_experts)
        width = self.scale.width
        if WIDTHS.search(key) and not NO_WIDTHS.search(key) and value > width:
            return value // width if value % width == 0 else 2 * max(1, value // (2 * width))
        return value
