"""Bytes of the tensors that a run really holds, for the planner to be held to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llm2vec_ds.engine.deepspeed_engine import Engine
from llm2vec_ds.model.quantization import weight_storages


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the distinct storages."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Frozen and trainable weights of a model that is whole."""
    trainable = storage_bytes(p for p in model.parameters() if p.requires_grad)
    return {"frozen": sum(weight_storages(model).values()) - trainable, "trainable": trainable}


class MeasuringEngine(Engine):
    """Notes gradients before the step and optimizer tensors after it, in bytes; under ZeRO-1 the most that
    backward held, before other ranks' parts went."""

    def __init__(self, model: nn.Module, config: dict[str, Any]) -> None:
        self._seen_bytes = 0
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model, config)
        for parameter in self._trainable:
            parameter.register_post_accumulate_grad_hook(self._look)

    def _look(self, _: torch.Tensor) -> None:
        held = storage_bytes(p.grad for p in self._trainable if p.grad is not None)
        self._seen_bytes = max(self._seen_bytes, held)

    def step(self, lr: float) -> float:
        optimizer = self._engine.optimizer
        self.gradient_bytes = (
            self._seen_bytes
            if self.zero_stage == 1
            else _gradient_bytes(self._engine.module, optimizer, self.zero_stage)
        )
        norm = super().step(lr)
        self.optimizer_bytes = _copies(optimizer, self.zero_stage) + _moments(optimizer)
        return norm

    def parts(self) -> dict[str, int]:
        """Weights of a model in parts (ZeRO-3)."""
        parameters = list(self._engine.module.parameters())
        parts = {
            name: sum(p.ds_tensor.numel() * p.itemsize for p in parameters if p.requires_grad is trains)
            for name, trains in (("trainable", True), ("frozen", False))
        }
        parts["frozen"] += storage_bytes(self._engine.module.buffers())
        return parts


def _gradient_bytes(model: nn.Module, optimizer: Any, stage: int) -> int:
    if stage == 0:
        return storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
    if stage == 3:
        return storage_bytes([optimizer.grad_partitions_flat_buffer])
    parts = [tensor for group in optimizer.averaged_gradients.values() for tensor in group]
    return sum(tensor.numel() * tensor.itemsize for tensor in parts)


def _copies(optimizer: Any, stage: int) -> int:
    names = {0: "fp32_groups", 1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
    groups = getattr(optimizer, names.get(stage, "fp32_partitioned_groups_flat"), [])
    tensors = [t for group in groups for t in (group if isinstance(group, list) else [group])]
    return storage_bytes(tensors)


def _moments(optimizer: Any) -> int:
    inner = getattr(optimizer, "optimizer", optimizer)
    # torch's step counters, scalars on the host, are no part of the plan.
    states = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    return storage_bytes(states)
