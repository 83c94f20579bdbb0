"""Bytes that one GPU sends in a step (docs/scaling.md), and an estimate of the step's time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm2vec_ds.config import MachineConfig
from llm2vec_ds.planner.workload import FP32, Workload

ID_BYTES = 8
BETWEEN_NODES_GBPS, INSIDE_NODE_GBPS = 200.0, 256.0
"""A network card of 200 Gb/s for each GPU; PCIe 4.0 ×16."""
UTILISATION = 0.4
"""Share of the data sheet's speed that matrix products of this size reach: an assumption."""


def step_bytes(
    load: Workload,
    zero: Mapping[str, Any],
    *,
    gradient_bytes: int,
    weight_bytes: int,
    width: int,
    element_bytes: int,
    exchange: str,
    recomputes: bool,
) -> int:
    """The sums of docs/scaling.md, for ZeRO-3 its upper bound.

    Args:
        gradient_bytes: G, of what trains. weight_bytes: P, of all weights.
        width: D, of a vector. element_bytes: b, of its numbers on the wire; gradients go home in fp32.
        recomputes: layers run again in backward, and ZeRO-3 gathers them for that.
    """
    world, m = load.world_size, load.micro_batches
    share = (world - 1) / world
    g, p = gradient_bytes * share, weight_bytes * share
    stage = int(zero.get("stage", 0))
    engine = {
        0: 2 * g,
        1: 3 * g,
        2: 2 * m * g + g,
        3: m * g + (load.forwards + m + (m if recomputes else 0)) * p,
    }[stage]
    return int(engine) + _loss_bytes(load, width, element_bytes, exchange)


def _loss_bytes(load: Workload, width: int, element_bytes: int, exchange: str) -> int:
    world = load.world_size
    there = load.documents * (element_bytes * width + ID_BYTES)
    home = load.documents * FP32 * width
    if world == 1:
        return 0
    if exchange == "ring":
        return 2 * (world - 1) * there + world * home
    return (world - 1) * (there + home)


@dataclass(frozen=True)
class StepTime:
    """Milliseconds; compute and communication are added, though they overlap in part."""

    compute_ms: float
    communication_ms: float

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.communication_ms


def step_time(
    load: Workload,
    machine: MachineConfig,
    sent_bytes: int,
    *,
    linear_parameters: int,
    attention_width: int,
    head_operations: float,
    trains_all: bool,
    checkpointing: bool,
) -> StepTime:
    """From operation counts: two for each weight and token, four for each pair of tokens and attention width.

    Args:
        linear_parameters: of the trunk, embeddings left out.
        attention_width: heads · head dim, summed over layers.
        head_operations: of MNTP's head in a step, both its products.
        trains_all: weights have gradients too, a third product.
        checkpointing: forward runs once more.
    """
    n_tokens = load.texts * load.tokens_a_text
    forward = n_tokens * (2.0 * linear_parameters + 4.0 * load.tokens_a_text * attention_width)
    passes = (2 if load.cached else 1) + (2 if trains_all else 1) + (1 if checkpointing else 0)
    compute_s = (forward * passes + head_operations) / (machine.tflops * 1e12 * UTILISATION)
    return StepTime(compute_s * 1e3, sent_bytes * 8 / (bandwidth_gbps(machine) * 1e9) * 1e3)


def bandwidth_gbps(machine: MachineConfig) -> float:
    """The recipe's, or what stands for the slowest link."""
    if machine.interconnect_gbps is not None:
        return machine.interconnect_gbps
    return BETWEEN_NODES_GBPS if machine.nodes > 1 else INSIDE_NODE_GBPS
