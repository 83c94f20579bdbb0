"""NF4 through bitsandbytes: the trunk's frozen linear weights in 4 bits (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from llm2vec_ds.errors import UserError

BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one (QLoRA, section 3)."""


def nf4_config(dtype: torch.dtype) -> Any:
    """transformers' description of NF4 with double quantisation.

    Args:
        dtype: of the products. The packed bytes are stored as this dtype too, so that what wraps a model
            (ZeRO, `.bfloat16()`) sees one floating-point dtype throughout.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    check_bitsandbytes("model.quantization: nf4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def checkpoint_bits(config: Any, path: str, wanted: str | None) -> int | None:
    """In how many bits bitsandbytes has stored a checkpoint's weights, 4 or 8; None: they are whole.

    Args:
        wanted: `model.quantization` of the run.

    Raises:
        UserError: they are quantised by other means, or not as the run wants them.
    """
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(), "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    original = "take the model that was quantised, with model.quantization=nf4 where memory is short"
    if not (four or eight):
        method = str(settings.get("quant_method", "means that it does not name"))
        raise UserError(
            f"model {path!r}: its weights are quantised by {method}, which is not read: {original}"
        )
    check_bitsandbytes(f"model {path!r}, whose weights bitsandbytes has quantised,")
    if wanted is not None and (eight or settings.get("bnb_4bit_quant_type") != "nf4"):
        found = "8 bits" if eight else f"4 bits as {settings.get('bnb_4bit_quant_type')}"
        raise UserError(
            f"model {path!r} is in {found}, model.quantization={wanted} wants nf4: set "
            f"model.quantization=null, or {original}"
        )
    return 4 if four else 8


def adopt_nf4(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes a checkpoint in NF4 like what `nf4_config(dtype)` loads: the same bytes, as this dtype."""
    for parameter in model.parameters():
        if not is_quantized(parameter) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for layer in quantized_layers(model):
        weight: Any = layer.weight
        weight.data = weight.data.flatten().view(dtype)[:, None]
        weight.quant_storage, weight.quant_state.dtype = dtype, dtype
        layer.quant_storage, layer.compute_dtype = dtype, dtype  # type: ignore[assignment]


def whole(model: Any, dtype: torch.dtype) -> Any:
    """A model whose weights bitsandbytes has quantised, as the matrices that they stand for."""
    for layer in quantized_layers(model):
        weight: Any = layer.weight
        weight.quant_state.dtype = dtype
    model = model.dequantize(dtype=dtype).to(dtype)
    vars(model).pop("_weight_conversions", None)  # from storage bytes; saving would look for the way back
    return model.requires_grad_(True)


def check_bitsandbytes(what: str) -> None:
    """Raises UserError where the package that `what` needs is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the package bitsandbytes: pip install 'llm2vec-ds[qlora]'")


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """The modules whose weight is in 4 bits."""
    return [module for module in model.modules() if hasattr(module, "quant_state")]


def prepare_for_training(model: nn.Module) -> None:
    """On CPUs with AVX-512 bf16 bitsandbytes repacks a weight at its first pass in evaluation mode, and the
    repacked weight has no backward: a held-out measurement would end the training. That is turned off."""
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(weight: Any) -> bool:
    """Is this parameter in 4 bits?"""
    return getattr(weight, "quant_state", None) is not None


def dequantized(weight: Any) -> torch.Tensor:
    """The matrix that a 4-bit parameter stands for, in its compute dtype; any other as it is."""
    if not is_quantized(weight):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    matrix: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return matrix


def quantize_shapes(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces the linear layers of a model on the meta device as loading in NF4 does, shapes alone.

    The language head stays: transformers leaves it out too.
    """
    config = nf4_config(dtype)
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(
        model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=config
    )
    for layer in quantized_layers(model):
        _quantize_shape(layer, dtype)


def _quantize_shape(layer: Any, dtype: torch.dtype) -> None:
    """What bitsandbytes would hold for one layer. Not by its own function, which keeps its first code table
    for all later calls, on the meta device too."""
    from bitsandbytes.functional import QuantState

    shape = layer.weight.shape
    n_blocks = -(-shape.numel() // BLOCK)
    with torch.device("meta"):
        inner = QuantState(
            torch.empty(-(-n_blocks // OUTER_BLOCK)),
            code=torch.empty(256),
            blocksize=OUTER_BLOCK,
            dtype=torch.float32,
        )
        layer.quant_state = QuantState(
            torch.empty(n_blocks, dtype=torch.uint8),
            shape=shape,
            code=torch.empty(16),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()),
            state2=inner,
        )
        layer.weight.data = torch.empty(-(-shape.numel() // (2 * dtype.itemsize)), 1, dtype=dtype)
    layer.weight.quant_state, layer.weight.bnb_quantized = layer.quant_state, True


def weight_storages(model: nn.Module) -> dict[int, int]:
    """Bytes of each storage that holds parameters, buffers and what NF4 needs to read them; by identity."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for layer in quantized_layers(model):
        if (state := layer.quant_state) is not None:
            tensors += state_tensors(state)
    return {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}


def state_tensors(state: Any) -> list[torch.Tensor]:
    """Tensors beside the packed weight: scales, their own scales (double quantisation), code tables."""
    own = [state.absmax, state.code, state.offset]
    inner = [state.state2.absmax, state.state2.code] if state.state2 is not None else []
    return [tensor for tensor in (*own, *inner) if tensor is not None]
