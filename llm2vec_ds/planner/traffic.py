"""Bytes that one GPU sends in a step (docs/scaling.md), and the speed of its link."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm2vec_ds.planner.workload import FP32, Workload
from llm2vec_ds.recipe.sections import MachineConfig

ID_BYTES = 8
BETWEEN_NODES_GBPS, INSIDE_NODE_GBPS = 200.0, 256.0
"""Assumed links: a network card of 200 Gb/s for each GPU, and PCIe 4.0 ×16."""


def step_bytes(
    load: Workload,
    zero: Mapping[str, Any],
    *,
    gradient_bytes: int,
    weight_bytes: int,
    width: int,
    recomputes: bool,
) -> int:
    """Returns the sums of docs/scaling.md. For ZeRO-3 this is the upper bound given there.

    Args:
        gradient_bytes: G, bytes of all gradients.
        weight_bytes: P, bytes of all weights.
        width: D, width of a vector. Gradients of vectors travel back in fp32.
        recomputes: True if layers run again in backward. ZeRO-3 then gathers their weights once more.
    """
    world, m = load.world_size, load.micro_batches
    share = (world - 1) / world
    g, p = gradient_bytes * share, weight_bytes * share
    stage = int(zero.get("stage", 0))
    engine = {
        0: 2 * g,  # one all-reduce of gradients a step
        1: 3 * g,  # the same, and one gather of new parameters
        2: 2 * m * g + g,  # an all-reduce for each micro-batch, and one gather
        # A reduce-scatter for each micro-batch. Each forward, backward and recomputation gathers weights.
        3: m * g + (load.forwards + m + (m if recomputes else 0)) * p,
    }[stage]
    return int(engine) + _loss_bytes(load, width)


def _loss_bytes(load: Workload, width: int) -> int:
    world, work = load.world_size, load.objective
    there, home = work.bytes_per_number * width + ID_BYTES, FP32 * width
    if world == 1:
        return 0
    # Ring: documents go around in forward and again in backward. Their gradients take one turn more, back to
    # the owner. Gather: each rank sends documents to all others and gets their gradients back.
    if work.exchange == "ring":
        n_sent = load.documents + load.rows * work.rounds_again_per_row
        return n_sent * (2 * (world - 1) * there + world * home)
    return load.documents * (world - 1) * (there + home)


def bandwidth_gbps(machine: MachineConfig) -> float:
    """Returns the recipe's bandwidth in Gb/s, or else the assumed one of the slowest link."""
    if machine.interconnect_gbps is not None:
        return machine.interconnect_gbps
    return BETWEEN_NODES_GBPS if machine.nodes > 1 else INSIDE_NODE_GBPS
