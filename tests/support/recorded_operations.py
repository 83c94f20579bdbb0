"""A stand-in for CUDA graphs on a CPU: records operations, and does them again on the same tensors.

As a CUDA graph does, a replay knows nothing but addresses: no Python runs, and a tensor that was made outside
the recording has whatever value it has by then. Between replays everything that a recording has made is
poisoned, so that a value left over from before shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm2vec_ds.model.graphs.recorder import Replay

T = TypeVar("T")
Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class RecordedOperations:
    """Attributes: n_recordings, n_replays: so far."""

    def __init__(self) -> None:
        self.n_recordings = self.n_replays = 0
        self._made: list[torch.Tensor] = []

    def forget(self) -> None:
        self._made.clear()

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def record(self, run: Callable[[], T]) -> tuple[T, Replay]:
        self.n_recordings += 1
        inference = torch.is_inference_mode_enabled()
        known = {_storage(tensor) for tensor in self._made}
        # transformers asks for it, and then leaves out what would wait for the device.
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True), _Watch() as watch:
            outcome = run()
        goes_on = any(_storage(x) in known for call in watch.calls for x in _tensors(call[1:3]))
        self._made += watch.made
        _poison(watch.made)

        def replay() -> None:
            self.n_replays += 1
            _poison(watch.made if goes_on else self._made)
            with torch.inference_mode() if inference else torch.no_grad():
                for call in watch.calls:
                    _again(*call)

        return outcome, replay


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a recording must not ask for a value: on a GPU it would wait for it")
        options = kwargs or {}
        made = {_storage(tensor) for tensor in self.made}
        if func._schema.is_mutable and not any(_storage(x) in made for x in _tensors(args[0])):
            self.calls.append((func, args, options, None))
            return args[0] if func._schema.returns else None  # a recording changes nothing outside
        out = func(*args, **options)
        given = {_storage(tensor) for tensor in _tensors((args, options))}
        new = [tensor for tensor in _tensors(out) if _storage(tensor) not in given]
        self.made += new
        if new or func._schema.is_mutable:  # else a view
            self.calls.append((func, args, options, out))
        return out


def _again(func: Any, args: tuple[Any, ...], options: dict[str, Any], before: Any) -> None:
    now = func(*args, **options)
    if not func._schema.is_mutable:
        for old, new in zip(_tensors(before), _tensors(now), strict=True):
            old.copy_(new)


def _poison(tensors: list[torch.Tensor]) -> None:
    counted = tuple(tensor for tensor in tensors if not tensor.is_inference())
    # For autograd nothing has changed: a backward that is still to be recorded will read them.
    with torch.inference_mode(), torch.autograd._unsafe_preserve_version_counter(counted):
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
