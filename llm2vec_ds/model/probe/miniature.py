"""Builds a miniature of a config: a trunk of the same kind that is small enough for quick checks in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from llm2vec_ds.model.bidirectional import with_causal
from llm2vec_ds.model.probe.small_config import Scale, shrunk
from llm2vec_ds.model.rope import choose_rope_by_text

MOST_PARAMETERS, MOST_LAYERS = 5_000_000, 20
AIM_WIDTH, AIM_HEAD = 128, 8
UNSEEN = ("idx", "index", "layer_id", "layer_num", "depth", "training")
"""Parts of attribute names that only number a layer. They do not say what kind of layer it is."""


class CannotBuild(Exception):
    """No small trunk of this kind can be built."""


@dataclass(frozen=True)
class Miniature:
    """A small config, from which trunks are built."""

    config: Any
    trust_remote_code: bool = False

    def trunk(self, causal: bool, attention: str) -> Any:
        """Builds a trunk in fp64 with random parameters, the same each time.

        Every parameter is drawn. A gate that starts at zero would hide everything behind it.
        """
        return self._drawn(AutoModel, causal, attention)

    def language_model(self, attention: str) -> Any:
        """Builds the causal model with its language head."""
        return self._drawn(AutoModelForCausalLM, True, attention)

    def _drawn(self, auto_class: Any, causal: bool, attention: str) -> Any:
        config = with_causal(copy.deepcopy(self.config), causal)
        model = built(config, attention, self.trust_remote_code, auto_class).double().eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.requires_grad_(False).parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * noise)
        choose_rope_by_text(model)
        return model


def miniatures(config: Any, causal: bool, trust_remote_code: bool = False) -> Iterator[Miniature]:
    """Yields miniatures of at most 5 million parameters with every kind of layer of `config`, the best first.

    Raises:
        CannotBuild: there is none. Says what went wrong first.
    """
    config = with_causal(copy.deepcopy(config), causal)
    whole = on_meta(config, trust_remote_code)
    kinds = [layer_kind(layer) for layer in layers_of(whole)]
    wrong = [] if kinds else ["its layers are in no list"]
    n_found = 0
    for scale in _scales(kinds, _divisor(whole.config)):
        try:
            small = type(config)(**shrunk(config, scale))
            shape = on_meta(with_causal(copy.deepcopy(small), causal), trust_remote_code)
        except Exception as error:  # configs and constructors can raise errors of every kind
            wrong.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        n_parameters = sum(parameter.numel() for parameter in shape.parameters())
        missing = set(kinds) - {layer_kind(layer) for layer in layers_of(shape)}
        if missing or n_parameters > MOST_PARAMETERS:
            wrong.append(f"{n_parameters:,} parameters, {len(missing)} kinds of layers missing")
            continue
        n_found += 1
        yield Miniature(small, trust_remote_code)
    if not n_found:
        raise CannotBuild(wrong[0] if wrong else "too many kinds of layers")


def layers_of(trunk: nn.Module) -> list[nn.Module]:
    """Returns the layers of a trunk, whatever their list is called. Empty if there is no such list."""
    count = getattr(trunk.config, "num_hidden_layers", None)
    inside: list[nn.ModuleList] = [part for part in trunk.modules() if isinstance(part, nn.ModuleList)]
    children: list[nn.ModuleList] = [part for part in trunk.children() if isinstance(part, nn.ModuleList)]
    counted = [part for part in inside if len(part) == count]
    found = counted or children or inside
    return list(max(found, key=len)) if found else []  # type: ignore[arg-type]


def layer_kind(layer: nn.Module) -> tuple[Any, ...]:
    """Describes the kind of a layer without its size: its parts, their classes and settings."""
    return tuple(
        (name, type(part).__name__, tuple(sorted(part._parameters)), tuple(sorted(_settings(part))))
        for name, part in layer.named_modules()
    )


def _settings(part: nn.Module) -> Iterator[str]:
    for name, value in vars(part).items():
        if name.startswith("_") or any(word in name for word in UNSEEN):
            continue
        if value is None or isinstance(value, bool | str):
            yield f"{name}={value}"


def _divisor(config: Any) -> int:
    """Returns a power of two that divides widths. Layers become narrow; heads stay wide enough for RoPE."""
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    most = min(config.hidden_size // AIM_WIDTH, head_dim // AIM_HEAD)
    return 1 << max(0, most.bit_length() - 1)


def _scales(kinds: list[tuple[Any, ...]], aim: int) -> Iterator[Scale]:
    """Yields layers and widths to try: the first layer of each kind, or all up to the last of these."""
    if not kinds:
        return
    firsts = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    others = [i for i in range(len(kinds)) if i not in firsts]
    few = sorted(firsts + others[: max(0, 2 - len(firsts))])
    prefix = list(range(max(2, firsts[-1] + 1)))[: len(kinds)]
    for layers in (few, prefix) if few != prefix else (few,):
        if len(layers) <= MOST_LAYERS:
            for divisor in (aim, 2 * aim, 4 * aim, *(d for d in (aim // 2, aim // 4) if d)):
                yield Scale(layers, len(kinds), divisor)


def on_meta(config: Any, trust_remote_code: bool) -> Any:
    """Builds a trunk on the meta device, which holds only shapes."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return built(config, None, trust_remote_code)


def built(config: Any, attention: str | None, trust_remote_code: bool, auto_class: Any = AutoModel) -> Any:
    return auto_class.from_config(
        config,
        attn_implementation=attention,
        experts_implementation="eager",  # the other implementations do not run in fp64
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
    )
