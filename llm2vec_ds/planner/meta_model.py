"""A recipe's model on the meta device: its tensors have a shape and a dtype, but no memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llm2vec_kernels.row_ops.dropout import Masks
from torch import nn

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.accepted import accepted
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.fused_layers import fuse_layers
from llm2vec_ds.model.loading import TrunkOptions, loading
from llm2vec_ds.model.lora_linear import LoraLinear
from llm2vec_ds.model.peft_adapters import resolve
from llm2vec_ds.model.quantization import quantize_shapes
from llm2vec_ds.model.recomputation import recompute_activations
from llm2vec_ds.objectives.registry import objective_of
from llm2vec_ds.planner.flash_shapes import register_for_shapes
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import AdapterConfig

META = torch.device("meta")


@dataclass
class MetaModel:
    """The model that the engine would train, without adapters. `head` is the objective's own module."""

    whole: nn.Module
    trunk: Any
    head: nn.Module | None

    @property
    def n_layers(self) -> int:
        layers = getattr(self.trunk, "layers", None)
        if layers is None:
            name = type(self.trunk).__name__
            raise UserError(
                f"{name} cannot be planned: its layers are not in `layers`. Choose a model with `layers`"
            )
        return len(layers)

    def cut(self, n_layers: int) -> None:
        """Keeps the first `n_layers` layers. Two runs of different depth then show what one layer needs."""
        self.trunk.layers = self.trunk.layers[:n_layers]


def model_config(recipe: Recipe, recipe_file: Path | None = None) -> Any:
    """Returns transformers' config of the recipe's model.

    It looks in the model's folder, at `model.config_file`, beside the recipe, and in the hub's cache on this
    machine, in this order. It downloads nothing, and runs the model's code only if the recipe trusts it.

    Raises:
        UserError: no place has a config, or it cannot be read.
    """
    from transformers import AutoConfig

    path, trusted = _base(recipe), recipe.model.trust_remote_code
    found = _config_file(recipe, recipe_file)
    with loading(str(found or path)):
        try:
            # A config.json may name code files next to it. transformers finds them only if it gets the
            # folder.
            where = found.parent if found and found.name == "config.json" else found or path
            return AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=trusted)
        except OSError:
            if found is not None:
                raise
            raise UserError(
                f"model {path!r} cannot be planned: its config.json is not on this machine. Name one with "
                "model.config_file, or put it beside the recipe"
            ) from None


def _config_file(recipe: Recipe, recipe_file: Path | None) -> Path | None:
    beside = recipe_file.parent / "config.json" if recipe_file else None
    own = Path(_base(recipe)) / "config.json"
    named = Path(recipe.model.config_file) if recipe.model.config_file else None
    if named is not None and not named.is_file():
        raise UserError(
            f"model.config_file {named} not found (relative paths start at {Path.cwd()}): give the path of "
            "the model's config.json"
        )
    return next((path for path in (own, named, beside) if path is not None and path.is_file()), None)


def _base(recipe: Recipe) -> str:
    """Returns the base model if the path is an adapter's folder. A hub id is returned as it is, unchecked."""
    path = recipe.model.path
    return resolve(path).base if Path(path).is_dir() else path


def meta_model(recipe: Recipe, config: Any, options: TrunkOptions) -> MetaModel:
    """Builds trunk and head without adapters, as a run would hold them on `options.device`."""
    from transformers import AutoModel, AutoModelForCausalLM

    with loading(recipe.model.path):
        trusted = recipe.model.trust_remote_code
        config = accepted(config, recipe.model.causal, trust_remote_code=trusted).config
    objective, dropout = objective_of(recipe), recipe.objective.attention_dropout
    if dropout:
        config.attention_dropout = dropout
    attention = register_for_shapes(options.device.type, dropout)
    auto_class = AutoModelForCausalLM if objective.uses_language_head else AutoModel
    with META:
        with loading(recipe.model.path):
            model = auto_class.from_config(
                config,
                dtype=options.dtype,
                attn_implementation=attention,
                trust_remote_code=recipe.model.trust_remote_code,
            )
        trunk = model.base_model
        if recipe.model.quantization is not None:
            quantize_shapes(model, options.dtype)
            trunk.is_loaded_in_4bit = True
        language_head = model.get_output_embeddings() if objective.uses_language_head else None
        head = objective.planned_head(language_head, trunk.config, recipe)
    if recipe.adapter is not None:
        model.requires_grad_(False)
    return MetaModel(model, trunk, head)


def trainable_shapes(model: MetaModel, adapter: AdapterConfig | None) -> list[torch.Size]:
    """Returns the shapes of all parameters that train: all weights, or the adapters that `add_lora` adds."""
    if adapter is None:
        return [parameter.shape for parameter in model.whole.parameters()]
    shapes = []
    for name, module in model.trunk.named_modules():
        if not isinstance(module, nn.Linear) or not _is_target(name, adapter):
            continue
        shapes += [
            torch.Size([adapter.rank, module.in_features]),
            torch.Size([module.out_features, adapter.rank]),
        ]
        if adapter.variant == "dora":
            shapes.append(torch.Size([module.out_features]))
    return shapes


def _is_target(name: str, adapter: AdapterConfig) -> bool:
    targets = adapter.target_modules
    return isinstance(targets, str) or any(name == t or name.endswith(f".{t}") for t in targets)


def put_adapters_in(model: MetaModel, recipe: Recipe, options: TrunkOptions) -> None:
    """Adds adapters, fused layers, dropout and checkpointing as in a run, for `simulate`."""
    if recipe.adapter is not None:
        with META:
            add_lora(model.trunk, recipe.adapter)
    if recipe.model.fused_layers == "auto":
        fuse_layers(model.trunk)
    if options.device.type != "cpu":
        _fuse_dropout(model.trunk)
        for layer in model.trunk.modules():
            if isinstance(layer, LoraLinear):
                layer.dropouts.masks_of = _Seeds
        _as_deepspeed_casts(model.whole, options.dtype)
    recompute_activations(model.trunk, recipe.model.activation_checkpointing)


def _as_deepspeed_casts(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts trainable weights to the run's dtype, as DeepSpeed does. The optimizer has the fp32 copy."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


class _Seeds(Masks):
    """Dropout masks as on a GPU, where a seed replaces them. The default on meta would be the CPU's masks."""

    def next_for(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=torch.int64)


class _FusedDropout(nn.Module):
    """Keeps one byte for each element, as CUDA's dropout does. The default on meta would be the CPU's way."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def _fuse_dropout(trunk: nn.Module) -> None:
    for module in list(trunk.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(module, name, _FusedDropout(child.p))
