"""Counts the bytes that DeepSpeed's collectives send, together with those of our own collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from llm2vec_ds.distributed import TRAFFIC

MESSAGES: dict[str, tuple[str, int]] = {
    "all_reduce": ("all_reduce", 0),
    "inference_all_reduce": ("all_reduce", 0),
    "all_reduce_coalesced": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "all_gather": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather_base": ("all_gather", 0),
    "all_gather_coalesced": ("all_gather", 0),
    "broadcast": ("broadcast", 0),
    "all_gather_single": ("all_gather", 0),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "all_to_all": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "gather": ("gather", 0),
    "send": ("send", 0),
    "isend": ("send", 0),
}
"""Maps a method of DeepSpeed's backend to its kind of collective and the number of the message argument."""
SILENT = frozenset(
    "recv irecv barrier monitored_barrier broadcast_object_list all_gather_object "
    "get_rank get_world_size get_global_rank get_world_group get_backend is_initialized "
    "init_process_group destroy_process_group new_group init_device_mesh enable_symm_mem_for_group "
    "has_all_gather_into_tensor has_reduce_scatter_tensor has_all_reduce_coalesced has_coalescing_manager "
    "get_all_gather_function get_reduce_scatter_function all_gather_function reduce_scatter_function".split()
)
"""Methods that send no tensor. They receive, synchronise, exchange small objects, or ask for properties."""


class CountedBackend:
    """Wraps DeepSpeed's communication backend and counts each message. Everything else passes through.

    DeepSpeed's own logger (`comms_logger`) would wait for the device at every collective.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        if name in MESSAGES:
            return _counted(name, attribute)
        if callable(attribute) and name not in SILENT and not name.startswith("_"):
            raise RuntimeError(
                f"DeepSpeed calls {name} of its backend, which may send bytes that are not counted: add it "
                "to MESSAGES or to SILENT in llm2vec_ds/engine/comm_bytes.py"
            )
        return attribute


def count_deepspeed_traffic() -> None:
    """Counts DeepSpeed's messages in `distributed.TRAFFIC` from now on. A second call does nothing."""
    from deepspeed.comm import comm

    if not isinstance(comm.cdb, CountedBackend):
        comm.cdb = CountedBackend(comm.cdb)


def _counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    kind, place = MESSAGES[name]

    def call(*arguments: Any, **options: Any) -> Any:
        values = [*arguments, *(value for key, value in options.items() if key != "group")]
        group = options.get("group") or next((a for a in arguments if isinstance(a, dist.ProcessGroup)), None)
        TRAFFIC.note(kind, _n_bytes(values[place]), dist.get_world_size(group))
        return method(*arguments, **options)

    return call


def _n_bytes(message: torch.Tensor | Iterable[torch.Tensor]) -> int:
    tensors = [message] if isinstance(message, torch.Tensor) else message
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
