"""Bytes that training keeps besides activations: weights, gradients, optimizer, DeepSpeed's own buffers.

The formulas follow what DeepSpeed 0.19 allocates. tests/planner/test_states.py compares them with measured
tensors. With W ranks, N trainable elements of b bytes on the device, and Adam with fp32 moments, a rank
holds:

    stage   trainable   gradients   optimizer
    0       b · N       b · N       8 · N for the moments, and 4 · N for an fp32 copy unless b = 4
    1       b · N       b · N       12 · N / W: fp32 copy and moments
    2       b · N       b · N / W   12 · N / W
    3       b · N / W   b · N / W   12 · N / W

A moving average (EMA) adds 4 bytes an element to the optimizer. 8-bit moments take about 2 bytes, not 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FP32 = 4
ALIGNMENT = 2
"""ZeRO-1 and 2 pad each rank's part to a multiple of this many elements."""
EIGHT_BIT_BLOCK, LEAST_EIGHT_BIT = 256, 4096
"""bitsandbytes: number of elements that share a scale, and elements of the smallest tensor kept in 8 bits."""


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, and on the host for offloaded parts.

    Attributes:
        frozen: weights that do not train, as this rank holds them.
        trainable: the device's copy of the weights that train.
        gradients: the most gradient bytes held at once. Under ZeRO-1 these are all gradients, until backward
            ends.
        optimizer: fp32 copy (if there is one), both moments, and the moving average (if there is one).
        buffers: communication buckets, and under ZeRO-3 gathered parameters.
        host: bytes on the host, for one rank.
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
    """Returns the states under `zero`, the `zero_optimization` section of a DeepSpeed JSON.

    Args:
        frozen_bytes: bytes of the frozen weights in one process without ZeRO, scales of NF4 included.
        dtype: dtype of the trainable weights on the device. bf16 weights have an fp32 copy in the optimizer.
        eight_bit: True if moments have 8 bits instead of fp32.
        averaged: True if there is also a moving average in fp32.
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
    # ZeRO-1 and 2 flatten all trainable weights into one tensor, pad it, and give each rank an equal part.
    unit = ALIGNMENT * world_size
    padded = -(-whole // unit) * unit
    part = padded // world_size
    own = FP32 * part * (1 + averaged) + _moments(part, eight_bit)
    gradients = dtype.itemsize * (whole if stage == 1 else part)
    # With overlap_comm, one bucket fills while the other is being sent.
    n_buckets = 2 if zero.get("overlap_comm") else 1
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), padded)
    buffers = n_buckets * dtype.itemsize * bucket
    offloaded = _is_offloaded(zero, "offload_optimizer")
    # The host holds the optimizer, fp32 gradients, and the new weights before they go back to the GPU.
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
    """Returns the states under ZeRO-3.

    Each rank holds 1/W of every parameter. Small parameters also stay gathered on every rank all the time.
    Others are gathered when a step needs them.
    """
    frozen = [shape.numel() for shape in frozen_shapes]
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    persistent = sum(size for size in (*frozen, *sizes) if size < threshold)
    gathered = min(sum((*frozen, *sizes)), int(zero.get("stage3_max_live_parameters", 1e9)))
    # The largest parameter (the embedding) is gathered whole, even above the limit.
    gathered = max(gathered, max((*frozen, *sizes), default=0))
    part = sum(-(-size // world_size) for size in sizes)
    frozen_part = sum(-(-size // world_size) for size in frozen)
    never_split = frozen_bytes - dtype.itemsize * sum(frozen)  # buffers, scales of NF4
    # hpZ (zero_hpz_partition_size) keeps a second copy of all weights in each group of ranks.
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
    """Returns the bytes of Adam's two moments for one tensor: 8 bytes an element in fp32.

    With 8 bits: one byte an element, and one fp32 scale a block, for each moment.
    """
    if not eight_bit or n_elements < LEAST_EIGHT_BIT:
        return 2 * FP32 * n_elements
    return 2 * (n_elements + FP32 * -(-n_elements // EIGHT_BIT_BLOCK))


def _is_offloaded(zero: Mapping[str, Any], section: str) -> bool:
    return (zero.get(section) or {}).get("device", "none") != "none"
