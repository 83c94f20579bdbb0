"""Bytes that training keeps beside the weights: gradients, optimizer, DeepSpeed's own buffers.

What DeepSpeed 0.19 allocates, held to measured tensors in tests/planner/test_states.py. W ranks, N
trainable elements, b bytes of an element on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FP32 = 4
ALIGNMENT = 2
"""ZeRO-1 and 2 pad a rank's part to a multiple of this many elements."""
EIGHT_BIT_BLOCK, LEAST_EIGHT_BIT = 256, 4096
"""bitsandbytes: elements that share a scale, and the smallest tensor that is kept in 8 bits."""


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, and on the host for what is offloaded.

    Attributes:
        frozen: weights that do not train, as this rank holds them.
        trainable: the device's copy of what trains.
        gradients: the most that is held of them; under ZeRO-1 all, until backward is through.
        optimizer: fp32 copy (where there is one) and both moments.
        buffers: communication buckets, and under ZeRO-3 gathered parameters.
        host: on the host, for one rank.
    """

    frozen: int
    trainable: int
    gradients: int
    optimizer: int
    buffers: int
    host: int = 0

    @property
    def on_device(self) -> int:
        return self.frozen + self.trainable + self.gradients + self.optimizer + self.buffers


def states(
    frozen_bytes: int,
    frozen_shapes: Sequence[torch.Size],
    trainable: Sequence[torch.Size],
    dtype: torch.dtype,
    zero: Mapping[str, Any],
    world_size: int,
    *,
    eight_bit: bool = False,
    averaged: bool = False,
) -> States:
    """The states under `zero`, a DeepSpeed JSON's `zero_optimization`.

    Args:
        frozen_bytes: of the weights as one process without ZeRO holds them, scales of NF4 included.
        dtype: of trainable weights on the device; bf16 has an fp32 copy in the optimizer.
        eight_bit: 8-bit moments instead of fp32.
        averaged: a moving average in fp32 beside the optimizer's own copy.
    """
    stage = int(zero.get("stage", 0))
    sizes = [shape.numel() for shape in trainable]
    whole = sum(sizes)
    if stage == 3:
        return _zero3(frozen_bytes, frozen_shapes, sizes, dtype, zero, world_size, eight_bit, averaged)
    if stage == 0:
        copy = FP32 * whole if dtype != torch.float32 else 0
        moments = sum(_moments(size, eight_bit) for size in ([whole] if copy else sizes))
        average = FP32 * whole * averaged
        return States(
            frozen_bytes, dtype.itemsize * whole, dtype.itemsize * whole, copy + moments + average, 0
        )
    unit = ALIGNMENT * world_size
    padded = -(-whole // unit) * unit
    part = padded // world_size
    own = FP32 * part * (1 + averaged) + _moments(part, eight_bit)
    gradients = dtype.itemsize * (whole if stage == 1 else part)
    n_buckets = 2 if zero.get("overlap_comm") else 1
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), padded)
    buffers = n_buckets * dtype.itemsize * bucket
    offloaded = _is_offloaded(zero, "offload_optimizer")
    # On the host: the optimizer, its gradients in fp32, and the new weights on their way back.
    host = own + (FP32 + dtype.itemsize) * part
    return States(
        frozen_bytes,
        dtype.itemsize * padded,
        gradients,
        0 if offloaded else own,
        buffers,
        host if offloaded else 0,
    )


def _zero3(
    frozen_bytes: int,
    frozen_shapes: Sequence[torch.Size],
    sizes: Sequence[int],
    dtype: torch.dtype,
    zero: Mapping[str, Any],
    world_size: int,
    eight_bit: bool,
    averaged: bool,
) -> States:
    """Every parameter is cut into equal parts, small ones stay whole beside; a step gathers the others."""
    frozen = [shape.numel() for shape in frozen_shapes]
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    persistent = sum(size for size in (*frozen, *sizes) if size < threshold)
    gathered = min(sum((*frozen, *sizes)), int(zero.get("stage3_max_live_parameters", 1e9)))
    # The largest (the embedding) is gathered whatever the limit.
    gathered = max(gathered, max((*frozen, *sizes), default=0))
    part = sum(-(-size // world_size) for size in sizes)
    frozen_part = sum(-(-size // world_size) for size in frozen)
    never_split = frozen_bytes - dtype.itemsize * sum(frozen)  # buffers, scales of NF4
    # hpZ keeps a second copy in each group of ranks.
    group = min(int(zero.get("zero_hpz_partition_size", 1)), world_size)
    second = sum(-(-size // group) for size in (*frozen, *sizes)) if group > 1 else 0
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    own = FP32 * part * (1 + averaged) + _moments(part, eight_bit)
    optimizer_away, parameters_away = (
        _is_offloaded(zero, f"offload_{what}") for what in ("optimizer", "param")
    )
    b = dtype.itemsize
    on_host = (own + FP32 * part if optimizer_away else 0) + (
        b * (part + frozen_part) if parameters_away else 0
    )
    return States(
        never_split + (0 if parameters_away else b * frozen_part),
        0 if parameters_away else b * part,
        0 if optimizer_away else b * part,
        0 if optimizer_away else own,
        b * (bucket + max(persistent, gathered) + second),
        on_host,
    )


def _moments(n_elements: int, eight_bit: bool) -> int:
    """Bytes of Adam's two moments of one tensor."""
    if not eight_bit or n_elements < LEAST_EIGHT_BIT:
        return 2 * FP32 * n_elements
    return 2 * (n_elements + FP32 * -(-n_elements // EIGHT_BIT_BLOCK))


def _is_offloaded(zero: Mapping[str, Any], section: str) -> bool:
    return (zero.get(section) or {}).get("device", "none") != "none"
