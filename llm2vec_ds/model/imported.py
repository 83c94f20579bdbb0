"""Adapters made elsewhere (in peft's format, as upstream `llm2vec` publishes them) onto a trunk, in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.reading import read_json

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UPSTREAM_SETTINGS = "llm2vec_config.json"
UPSTREAM_POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "eos_token": "eos",
    "last_token": "last",
    "bos_token": "bos",
}


@dataclass(frozen=True)
class Stack:
    """The model whose weights come first, and the folders of the adapters on it, first to last."""

    base: str
    adapters: tuple[Path, ...]


@dataclass(frozen=True)
class UpstreamSettings:
    """What upstream `llm2vec` writes into its settings file, with its defaults."""

    pooling_mode: str = "mean"
    max_length: Annotated[int, Field(ge=1)] = 512
    doc_max_length: Annotated[int, Field(ge=1)] = 400
    skip_instruction: bool = True


def resolve(path: str, adapters: Sequence[str | Path]) -> Stack:
    """A folder or hub id that holds only an adapter stands for the model it names, with that adapter on it.

    Raises:
        UserError: an adapter cannot be found, or names no base model.
    """
    stack, base = [_local(str(adapter)) for adapter in adapters], path
    while (folder := Path(base)).is_dir() and (folder / CONFIG).is_file() and not _has_own_weights(folder):
        stack.insert(0, folder)
        named = _config(folder).get("base_model_name_or_path")
        if not named or named == base:
            raise UserError(f"{folder / CONFIG} names no base model: give the model, and this as an adapter")
        base = str(named)
    return Stack(base, tuple(stack))


def _has_own_weights(folder: Path) -> bool:
    return any(file.name != WEIGHTS for file in folder.glob("*.safetensors"))


def _local(adapter: str) -> Path:
    if (Path(adapter) / CONFIG).is_file():
        return Path(adapter)
    if Path(adapter).exists():
        raise UserError(f"adapter {adapter} has no {CONFIG}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(adapter, allow_patterns=[CONFIG, WEIGHTS, UPSTREAM_SETTINGS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"adapter {adapter!r}: there is no such folder, and not on the hub ({reason})"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG, dict[str, Any], "take the adapter from its source again")


def merge_adapters(trunk: nn.Module, adapters: Sequence[Path]) -> None:
    """Adds each adapter's update to the trunk's weights, in fp32, in this order.

    Raises:
        UserError: an adapter is no plain LoRA, or does not fit the trunk.
    """
    for folder in adapters:
        n_layers = _merge(trunk, folder)
        log.info("%s: LoRA merged into %s linear layers", folder, n_layers)


def _merge(trunk: nn.Module, folder: Path) -> int:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    _check(folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        inject_adapter_in_model(config, trunk)
    except (ValueError, TypeError, AttributeError) as error:  # the latter two: values of wrong types
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"adapter {folder} does not fit {type(trunk).__name__}: {reason}") from None
    layers = {name: module for name, module in trunk.named_modules() if isinstance(module, LoraLayer)}
    _load(trunk, folder)
    with torch.no_grad():
        for name, layer in layers.items():
            base: Any = layer.get_base_layer()
            update = layer.get_delta_weight("default").float()
            base.weight.copy_((base.weight.float() + update).to(base.weight.dtype))
            parent, _, child = name.rpartition(".")
            setattr(trunk.get_submodule(parent), child, base)
    del trunk.peft_config  # else the next adapter would be taken for a second one beside this
    return len(layers)


def _check(folder: Path) -> None:
    config = _config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"adapter {folder} is of the type {config.get('peft_type')!r}: only LORA can be merged"
        )
    for key, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(key, plain) not in (plain, []):
            raise UserError(f"adapter {folder} has {key}={config[key]!r}, which cannot be merged here")
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"adapter {folder} has no {WEIGHTS}: pickled weights (.bin) are not read; save it anew with peft"
        )


def _load(trunk: nn.Module, folder: Path) -> None:
    """Weights under peft's names, `base_model.model.[model.]layers…`, on the trunk's `layers…`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS} is damaged ({error}): take the adapter from its source again"
        ) from None
    wanted = {name: p for name, p in trunk.named_parameters() if "lora_" in name}
    found: dict[str, torch.Tensor] = {}
    for key, value in stored.items():
        name = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        found[name if name in wanted else name.removeprefix("model.")] = value
    if strange := sorted(found.keys() - wanted.keys()):
        raise UserError(f"adapter {folder} has weights for {strange[0]}, which {type(trunk).__name__} lacks")
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"adapter {folder} lacks the weights of {missing[0]}")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            here = tuple(wanted[name].shape)
            raise UserError(f"adapter {folder}: {name} has shape {tuple(value.shape)}, the model {here}")
        wanted[name].data.copy_(value)


def upstream_settings(folder: Path) -> dict[str, Any]:
    """What `llm2vec_config.json` says, in `EncoderSettings`' names; empty where there is none.

    Raises:
        UserError: the file is damaged, or names a pooling that is not known here.
    """
    file = folder / UPSTREAM_SETTINGS
    if not file.is_file():
        return {}
    stored = read_json(file, UpstreamSettings, "take the adapter from its source again")
    if stored.pooling_mode not in UPSTREAM_POOLINGS:
        raise UserError(f"{file}: pooling_mode {stored.pooling_mode!r} is unknown here")
    return {
        "pooling": UPSTREAM_POOLINGS[stored.pooling_mode],
        "max_tokens": stored.max_length,
        "max_text_tokens": stored.doc_max_length,
        "pooled_tokens": "text" if stored.skip_instruction else "all",
    }
