"""Converts the weights of a trunk to llama.cpp's names, order and storage, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from llm2vec_ds.errors import UserError
from llm2vec_ds.export.gguf.architecture import Architecture
from llm2vec_ds.export.gguf.rope import Rope

ROW_OF_Q8_0 = 32


@dataclass(frozen=True)
class Storage:
    """How matrices are stored. Vectors and norms stay fp32, as llama.cpp requires."""

    kind: GGMLQuantizationType
    file_type: LlamaFileType


STORAGES = {
    "f32": Storage(GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": Storage(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Storage(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Storage(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: name in the file.
        of: name in the trunk; None for RoPE's factors.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    of: str | None


def tensors_of(trunk: Any, architecture: Architecture, rope: Rope, storage: Storage) -> list[Tensor]:
    """Returns the file's tensors in their order.

    Raises:
        UserError: llama.cpp has no weight of that name in this architecture.
    """
    arch = gguf.MODEL_ARCH[architecture.name]
    names = gguf.get_tensor_name_map(arch, trunk.config.num_hidden_layers)
    found = []
    for name, value in trunk.state_dict().items():
        given = names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        if given is None:
            raise UserError(
                f"--format gguf: llama.cpp has no weight {name!r} in {gguf.MODEL_ARCH_NAMES[arch]}: "
                "use --format sentence-transformers"
            )
        shape = tuple(value.shape)
        kind = storage.kind if len(shape) > 1 else GGMLQuantizationType.F32
        if kind == GGMLQuantizationType.Q8_0 and shape[-1] % ROW_OF_Q8_0:
            raise UserError(
                f"--dtype q8_0: rows of {name} have {shape[-1]} numbers, which is not a multiple of "
                f"{ROW_OF_Q8_0}: use --dtype f16"
            )
        found.append(Tensor(given, shape, kind, name))
    if rope.factors is not None:
        shape = rope.factors.shape
        found += [Tensor(name, shape, GGMLQuantizationType.F32, None) for name in architecture.rope_tensors]
    return found


def values_of(
    trunk: Any, architecture: Architecture, rope: Rope, tensors: list[Tensor]
) -> Iterator[np.ndarray]:
    """Yields the bytes of each tensor in order. Only one is in memory at a time."""
    state = trunk.state_dict()
    for tensor in tensors:
        if tensor.of is None:
            assert rope.factors is not None
            yield rope.factors
            continue
        value = state[tensor.of].detach().to("cpu", torch.float32).numpy()
        yield gguf.quants.quantize(_reordered(value, tensor.of, architecture, trunk.config), tensor.kind)


def _reordered(value: np.ndarray, name: str, architecture: Architecture, config: Any) -> np.ndarray:
    """Returns a weight with rows in llama.cpp's order, and with the norm's offset added."""
    part = name.split(".")[-2]
    if architecture.pairs_side_by_side and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        by_half = value.reshape(heads, 2, -1, *value.shape[1:])  # [heads, half, pair, …]
        return np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(value.shape)
    if part.endswith("norm"):
        return value + np.float32(architecture.norm_offset)
    return np.ascontiguousarray(value)
