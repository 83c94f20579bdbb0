"""Merges adapters in peft's format into a trunk. Upstream `llm2vec` publishes its models in this format."""

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
from llm2vec_ds.model.adapters import check_is_linear
from llm2vec_ds.recipe.sections import AdapterConfig
from llm2vec_ds.storage.reading import read_json

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that hold the weights of a whole model."""
KNOWN_SETTINGS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Keys that an adapter's settings may hold. With them the update is scale · B·A, or only training reads them.
Those in the last line belong to `init_lora_weights`."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
STARTS = (*PLAIN_STARTS, "pissa", "olora")
"""Values of `init_lora_weights` for which the update is known. `pissa` and `olora` change the base weights.
peft repeats that change when it puts the adapter on. It writes True if it has converted another start."""
UPSTREAM_SETTINGS = "llm2vec_config.json"
UPSTREAM_POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "eos_token": "eos",
    "last_token": "last",
    "bos_token": "bos",
}


@dataclass(frozen=True)
class ModelSource:
    """A base model, and the folders of the adapters on it, first to last."""

    base: str
    adapters: tuple[Path, ...]


@dataclass(frozen=True)
class UpstreamSettings:
    """The settings file of upstream `llm2vec`, with upstream's defaults."""

    pooling_mode: str = "mean"
    max_length: Annotated[int, Field(ge=1)] = 512
    doc_max_length: Annotated[int, Field(ge=1)] = 400
    skip_instruction: bool = True


def resolve(path: str, adapters: Sequence[str | Path] = ()) -> ModelSource:
    """Finds the base model of `path` and all adapters on it.

    A folder or hub id that holds only an adapter stands for the model that it names, with that adapter on it.

    Args:
        path: a model or an adapter.
        adapters: further adapters, on top of `path`.

    Raises:
        UserError: an adapter cannot be found or names no base model. Or a folder holds both a model and an
            adapter.
    """
    stack, base = [_local(str(adapter)) for adapter in adapters], path
    while (config := file_of(base, CONFIG)) is not None:
        if own := next((name for name in OWN_WEIGHTS if file_of(base, name)), None):
            raise UserError(
                f"model {base} holds a whole model ({own}) and an adapter ({CONFIG}), so it is unclear "
                "which is meant: give a folder that holds only one of them"
            )
        folder = config.parent if Path(base).is_dir() else _local(base)
        stack.insert(0, folder)
        named = _config(folder).get("base_model_name_or_path")
        if not named or named == base:
            raise UserError(
                f"{folder / CONFIG} names no base model: use Encoder.from_pretrained(MODEL, adapters=[…])"
            )
        base = str(named)
    return ModelSource(base, tuple(stack))


def tokenizer_place(path: str) -> str:
    """Returns where the tokenizer of a model lies. An adapter without one uses that of its base model.

    Raises:
        UserError: as `resolve`.
    """
    if file_of(path, CONFIG) is None or file_of(path, "tokenizer_config.json") is not None:
        return path
    return resolve(path).base


def file_of(place: str, name: str) -> Path | None:
    """Returns a file of a folder or of a model on the hub.

    None if there is no such file, or if the hub cannot be reached and the file is not in the cache.
    """
    if Path(place).is_dir():
        file = Path(place) / name
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            place,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # there is no such model; loading it will say so
        return None
    return Path(found) if found else None


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
            f"adapter {adapter!r}: there is no such folder, and no such adapter on the hub ({reason})"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG, dict[str, Any], "get the adapter from its source again")


def merge_adapters(trunk: nn.Module, adapters: Sequence[Path]) -> None:
    """Adds each adapter's update to the trunk's weights, in the given order. The sums are in fp32.

    Raises:
        UserError: an adapter is not plain LoRA, or does not fit the trunk.
    """
    for folder in adapters:
        n_layers = _merge(trunk, folder)
        log.info("%s: LoRA merged into %s linear layers", folder, n_layers)


def _merge(trunk: nn.Module, folder: Path) -> int:
    """Merges one adapter. Returns the number of layers that it changed."""
    trained = {name: parameter.requires_grad for name, parameter in trunk.named_parameters()}
    layers = _put_on(trunk, folder)
    with torch.no_grad():
        for name, layer in layers.items():
            base: Any = layer.get_base_layer()
            update = layer.get_delta_weight("default").float()
            base.weight.copy_((base.weight.float() + update).to(base.weight.dtype))
            parent, _, child = name.rpartition(".")
            setattr(trunk.get_submodule(parent), child, base)
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(trained[name])  # peft froze them
    return len(layers)


def _put_on(trunk: nn.Module, folder: Path) -> dict[str, Any]:
    """Puts the folder's adapter with its weights on the trunk. Returns the layers that got it, by name."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    _check(folder)
    stored = _weights(folder)
    # The settings name layers as in the model that was trained: a language model or a trunk alone.
    place = f"{getattr(trunk, 'base_model_prefix', 'model')}."
    inside = any(key.startswith(place) for key in stored)
    model = _around(trunk, place[:-1]) if inside else trunk
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        inject_adapter_in_model(config, model)
    except (ValueError, TypeError, AttributeError) as error:  # a value of a wrong type too
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"adapter {folder} does not fit {type(trunk).__name__}: {reason}") from None
    layers = {name: module for name, module in trunk.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        check_is_linear(name, layer.get_base_layer(), f"adapter {folder}")
    _load(trunk, folder, {key.removeprefix(place) if inside else key: v for key, v in stored.items()})
    vars(model).pop("peft_config", None)  # otherwise peft would add the next adapter beside this one
    return layers


def _around(trunk: nn.Module, name: str) -> nn.Module:
    """Returns a module that holds the trunk under the name that it has in a language model."""
    model: Any = nn.Module()
    model.add_module(name, trunk)
    model.config = trunk.config
    return model


def _check(folder: Path) -> None:
    """Refuses settings with which the update is not scale · B·A, or depends on more than its layer."""
    from peft import LoraConfig

    config = _config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder} has the type {config.get('peft_type')!r}: only LORA can be merged")
    defaults = vars(LoraConfig())
    for key, value in config.items():
        usual: tuple[Any, ...] = (defaults.get(key), None, False, [], {}, "none")
        if key not in KNOWN_SETTINGS and value not in usual:
            raise UserError(f"adapter {folder} has {key}={value!r}, which cannot be merged here")
    start = config.get("init_lora_weights", True)
    if start not in STARTS and not str(start).startswith("pissa_niter_"):
        raise UserError(
            f"adapter {folder} has init_lora_weights={start!r}, whose base weights are not known here: "
            "convert it with peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"adapter {folder} has no {WEIGHTS}: pickled weights (.bin) are not read; save it again with peft"
        )


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the adapter's tensors by peft's names, without the prefix `base_model.model.`"""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS} is damaged ({error}): get the adapter from its source again"
        ) from None
    return {key.removeprefix("base_model.model."): value for key, value in stored.items()}


def _load(trunk: nn.Module, folder: Path, stored: dict[str, torch.Tensor]) -> None:
    """Copies stored weights into the trunk's adapters. Names and shapes must be the same."""
    wanted = {name: p for name, p in trunk.named_parameters() if ".lora_" in name}
    found = {key.removesuffix(".weight") + ".default.weight": value for key, value in stored.items()}
    if strange := sorted(found.keys() - wanted.keys()):
        where = strange[0].replace(".default.weight", "")
        raise UserError(f"adapter {folder} has weights for {where}, which {type(trunk).__name__} lacks")
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"adapter {folder} lacks the weights of {missing[0]}")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            here = tuple(wanted[name].shape)
            raise UserError(f"adapter {folder}: {name} has shape {tuple(value.shape)}, the model's is {here}")
        wanted[name].data.copy_(value)


def lora_settings(folder: Path) -> AdapterConfig:
    """Returns the settings of a folder's adapter. The targets are the full names of layers with weights.

    Raises:
        UserError: the adapter cannot be merged, its layers differ in rank or scale, or it changes the base.
    """
    _check(folder)
    config, obstacle = _config(folder), ""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        obstacle = "has layers of several ranks or scales"
    elif (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        obstacle = f"has init_lora_weights={start!r}, which changes the base weights"
    if obstacle:
        raise UserError(
            f"adapter {folder} {obstacle}, so it cannot be stacked over nf4: merge it first, with "
            "Encoder.from_pretrained(…).save(…), or set model.quantization=null"
        )
    return AdapterConfig(
        variant="rslora" if config.get("use_rslora") else "lora",
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=0.0,
        target_modules=sorted({key.partition(".lora_")[0] for key in _weights(folder)}),
    )


def upstream_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings in `llm2vec_config.json` by the names of `EncoderSettings`. Empty without a file.

    Raises:
        UserError: the file is damaged or names an unknown pooling.
    """
    file = folder / UPSTREAM_SETTINGS
    if not file.is_file():
        return {}
    stored = read_json(file, UpstreamSettings, "get the adapter from its source again")
    if stored.pooling_mode not in UPSTREAM_POOLINGS:
        raise UserError(f"{file}: pooling_mode {stored.pooling_mode!r} is unknown here")
    return {
        "pooling": UPSTREAM_POOLINGS[stored.pooling_mode],
        "max_tokens": stored.max_length,
        "max_text_tokens": stored.doc_max_length,
        "pooled_tokens": "text" if stored.skip_instruction else "all",
    }
