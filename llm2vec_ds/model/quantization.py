"""Holds the trunk's frozen linear weights in 4 bits: NF4 by bitsandbytes (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from llm2vec_ds.errors import UserError

BLOCK, OUTER_BLOCK = 64, 256
"""Number of weights that share a scale, and number of scales that share an outer scale (QLoRA, section 3)."""


def nf4_config(dtype: torch.dtype) -> Any:
    """Returns transformers' description of NF4 with double quantisation.

    Args:
        dtype: dtype of the products. The packed bytes are stored as this dtype too. So code that wraps a
            model (ZeRO, `.bfloat16()`) sees one floating-point dtype throughout.

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
    """Returns the bits in which bitsandbytes has stored a checkpoint's weights: 4, 8, or None if unquantised.

    Args:
        wanted: `model.quantization` of the run.

    Raises:
        UserError: they are quantised by another method, or not as the run wants them.
    """
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(), "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    original = "use the original model, with model.quantization=nf4 if memory is short"
    if not (four or eight):
        method = str(settings.get("quant_method", "means that it does not name"))
        raise UserError(
            f"model {path!r}: its weights are quantised by {method}, which cannot be read: {original}"
        )
    check_bitsandbytes(f"model {path!r}, whose weights bitsandbytes has quantised,")
    if wanted is not None and (eight or settings.get("bnb_4bit_quant_type") != "nf4"):
        found = "8 bits" if eight else f"4 bits as {settings.get('bnb_4bit_quant_type')}"
        raise UserError(
            f"model {path!r} is in {found}, but model.quantization={wanted} wants nf4: set "
            f"model.quantization=null, or {original}"
        )
    return 4 if four else 8


def adopt_nf4(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores the bytes of an NF4 checkpoint's model as `dtype`, as if `nf4_config(dtype)` had loaded it."""
    for parameter in model.parameters():
        if not is_quantized(parameter) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for layer in quantized_layers(model):
        weight: Any = layer.weight
        weight.data = weight.data.flatten().view(dtype)[:, None]
        weight.quant_storage, weight.quant_state.dtype = dtype, dtype
        layer.quant_storage, layer.compute_dtype = dtype, dtype  # type: ignore[assignment]


def whole(model: Any, dtype: torch.dtype) -> Any:
    """Dequantises a model that bitsandbytes has quantised."""
    for layer in quantized_layers(model):
        weight: Any = layer.weight
        weight.quant_state.dtype = dtype
    model = model.dequantize(dtype=dtype).to(dtype)
    # These convert stored bytes into weights. Saving would look for the way back.
    vars(model).pop("_weight_conversions", None)
    return model.requires_grad_(True)


def check_bitsandbytes(what: str) -> None:
    """Raises a UserError if bitsandbytes, which `what` needs, is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the package bitsandbytes: pip install 'llm2vec-ds[qlora]'")


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules whose weight is in 4 bits."""
    return [module for module in model.modules() if hasattr(module, "quant_state")]


def prepare_for_training(model: nn.Module) -> None:
    """Turns off a repacking of weights that would end the training.

    On CPUs with AVX-512 bf16, bitsandbytes repacks a weight in its first pass in evaluation mode. The
    repacked weight has no backward. So training could not go on after a held-out measurement.
    """
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(weight: Any) -> bool:
    """Says whether a parameter is in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def dequantized(weight: Any) -> torch.Tensor:
    """Returns a 4-bit parameter as a matrix in its compute dtype. Returns any other parameter as it is."""
    if not is_quantized(weight):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    matrix: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return matrix


def quantize_shapes(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces the linear layers of a model on the meta device as loading in NF4 does. Only shapes count.

    The language head stays as it is, because transformers does not quantise it either.
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
    """Gives a layer the tensors that bitsandbytes would hold for it, as shapes.

    Does not call bitsandbytes' own function. That keeps its first code table for all later calls, even if it
    is on the meta device.
    """
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
    """Returns the bytes of each storage of parameters, buffers and NF4's own tensors, by storage identity."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for layer in quantized_layers(model):
        if (state := layer.quant_state) is not None:
            tensors += state_tensors(state)
    return {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}


def state_tensors(state: Any) -> list[torch.Tensor]:
    """Returns the tensors beside the packed weight: scales, their outer scales, and code tables."""
    own = [state.absmax, state.code, state.offset]
    inner = [state.state2.absmax, state.state2.code] if state.state2 is not None else []
    return [tensor for tensor in (*own, *inner) if tensor is not None]
