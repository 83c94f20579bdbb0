"""Adapters over a base model: those of earlier stages, and those that were made elsewhere.

Over a quantised base they are stacked: a merge into 4 bits would round them. Otherwise they are merged.

An encoder folder that was trained over NF4 holds merged weights, which users load. It also holds the base's
name and each stage's adapter in `adapters/`. The next stage starts from these.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapters import TRAINED, GatherParameters, adapter_names, add_lora, check_whole
from llm2vec_ds.model.peft_adapters import WEIGHTS, lora_settings, resolve
from llm2vec_ds.recipe.sections import AdapterConfig
from llm2vec_ds.storage.reading import read_json

log = logging.getLogger(__name__)

FOLDER, INDEX = "adapters", "stack.json"


@dataclass(frozen=True)
class AdapterStack:
    """A base model and the adapters over it, in the order of their training.

    Attributes:
        base: folder or hub id of the base model.
        earlier: settings and file of each stacked adapter.
        trained: settings of the adapter that trains now, if any.
        merged: folders of adapters in peft's format. They are merged into the base's weights.
    """

    base: str
    earlier: tuple[tuple[AdapterConfig, Path], ...] = ()
    trained: AdapterConfig | None = None
    merged: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Item:
    file: str
    settings: AdapterConfig


@dataclass(frozen=True)
class _Index:
    """The content of INDEX, as `write_stack` writes it."""

    base: str
    adapters: list[_Item]


def read_stack(path: str, quantization: str | None, trained: AdapterConfig | None) -> AdapterStack:
    """Returns what to load for `model.path`.

    If the run is quantised and the encoder folder has a stack, this is the base and the stack's adapters. For
    an adapter in peft's format it is the adapter and its base. Otherwise it is the folder itself.

    Raises:
        UserError: the folder's index is damaged, or an adapter cannot be merged or stacked.
    """
    index = Path(path) / FOLDER / INDEX
    if quantization is None or not index.is_file():
        found = resolve(path)
        if not found.adapters or quantization is None:
            return AdapterStack(found.base, trained=trained, merged=found.adapters)
        below = read_stack(found.base, quantization, None)
        above = tuple((lora_settings(folder), folder / WEIGHTS) for folder in found.adapters)
        return AdapterStack(below.base, (*below.earlier, *above), trained)
    stored = read_json(index, _Index, "copy the encoder folder from its run again")
    earlier = [(item.settings, index.parent / item.file) for item in stored.adapters]
    return AdapterStack(stored.base, tuple(earlier), trained)


def put_stack_in(trunk: nn.Module, stack: AdapterStack) -> None:
    """Puts the earlier adapters on the trunk, frozen and without dropout.

    Raises:
        UserError: a file is missing or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def short(key: str) -> str:
        """Removes peft's prefix and suffix from a layer's name, and the trunk's name in a language model."""
        within = key.removeprefix("base_model.model.").removeprefix(f"{trunk.base_model_prefix}.")
        return within.removesuffix(".weight")

    for number, (settings, file) in enumerate(stack.earlier):
        name, targets = _stacked(number), settings.target_modules
        changes = {
            "dropout": 0.0,
            "variant": _without_start(settings),
            "target_modules": targets if isinstance(targets, str) else [short(target) for target in targets],
        }
        add_lora(trunk, settings.model_copy(update=changes), name)
        try:
            values = {short(key): value for key, value in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"adapter {file} cannot be read: {error}") from None
        own = _parameters(trunk, name)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in values.items()}:
            raise UserError(f"adapter {file} is for another model than {stack.base}: check {INDEX} beside it")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(values[key])
        log.info("%s: LoRA stacked on %s", file, stack.base)
    trunk.requires_grad_(False)


def adapter_state(
    trunk: nn.Module, gather: GatherParameters = lambda parameters: nullcontext()
) -> dict[str, dict[str, torch.Tensor]]:
    """Returns each adapter's values in fp32 on the CPU, by the adapter's name and `LAYER.lora_A` …

    Args:
        gather: see `merged_state_dict`. Every rank must call this function.

    Raises:
        RuntimeError: a parameter is not whole although it was gathered.
    """
    state = {}
    for name in adapter_names(trunk):
        own = _parameters(trunk, name)
        with gather(list(own.values())):
            check_whole(f"adapter {name}: ", own.items())
            state[name] = {k: v.detach().float().cpu().clone() for k, v in own.items()}
    return state


def write_stack(stack: AdapterStack, state: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    """Writes `folder/adapters/`: an index, and a safetensors file for each adapter in `state`."""
    from safetensors.torch import save_file

    (folder / FOLDER).mkdir(parents=True)
    names = [_stacked(number) for number in range(len(stack.earlier))]
    settings = [own for own, _ in stack.earlier]
    if stack.trained is not None:
        names, settings = [*names, TRAINED], [*settings, stack.trained]
    items: list[dict[str, Any]] = []
    for number, (name, own) in enumerate(zip(names, settings, strict=True)):
        file = f"{number}.safetensors"
        save_file(state[name], folder / FOLDER / file)
        items.append({"file": file, "settings": own.model_dump(mode="json")})
    base = str(Path(stack.base).resolve()) if Path(stack.base).exists() else stack.base
    said = json.dumps({"base": base, "adapters": items}, indent=1) + "\n"
    (folder / FOLDER / INDEX).write_text(said, encoding="utf-8")


def _stacked(number: int) -> str:
    return f"stacked_{number}"


def _parameters(trunk: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Returns an adapter's parameters by `LAYER.lora_A`, `LAYER.lora_B`, `LAYER.lora_magnitude_vector`."""
    ending = f".{name}.weight"
    found = ((key, value) for key, value in trunk.named_parameters() if ".lora_" in key)
    return {key.removesuffix(ending): value for key, value in found if key.endswith(ending)}


def _without_start(settings: AdapterConfig) -> str:
    """Returns the variant for loading trained weights. PiSSA is LoRA with a start that is not needed here."""
    return "lora" if settings.variant == "pissa" else settings.variant
