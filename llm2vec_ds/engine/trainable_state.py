"""The state that a step changes, as whole fp32 tensors: value and Adam's moments of each trainable parameter.

The format is the same for every ZeRO stage, for any number of ranks, and for LoRA and full training. So a run
can resume under another stage or with other ranks. There are no pickles.

Ranks write parts of at most a gigabyte in turn. So a rank never holds more than one part beside its own share
of the model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from llm2vec_ds.distributed import rank, world_size
from llm2vec_ds.engine.checkpoint import Hashes
from llm2vec_ds.engine.flat_parameter import FlatParameter
from llm2vec_ds.storage.durable import write_file

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
STEM = "part"
PART_BYTES = 2**30

Tensors = dict[str, torch.Tensor]


def weight_files(files: Iterable[str]) -> list[str]:
    """Returns those files of a checkpoint that `TrainableState.write` wrote."""
    return [file for file in files if file.startswith(f"{STEM}-")]


class TrainableState:
    """Reads and sets the state of a model under a DeepSpeed engine. All ranks call each method together."""

    def __init__(self, engine: Any, *, flat: FlatParameter | None = None, has_moments: bool = True) -> None:
        """
        Args:
            engine: what `deepspeed.initialize` returned.
            flat: the flat parameter, if the engine trains it in place of the model's own parameters.
            has_moments: False if the optimizer's moments are no tensors of a parameter's shape. Then they are
                not saved, and start again on resume.
        """
        self._engine = engine
        self._moments = MOMENTS if has_moments else ()
        self._zero_stage = int(engine.zero_optimization_stage())
        self._flat = flat
        # The names are the model's, not those of DeepSpeed's groups.
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._shapes: dict[str, torch.Size] = (
            {name: place.shape for name, place in flat.places.items()}
            if flat is not None
            else {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()}
        )
        # A plain optimizer steps on the parameters themselves. DeepSpeed's own (ZeRO, bf16) wraps another one
        # and steps on its own flat fp32 tensors.
        self._is_plain = not hasattr(engine.optimizer, "optimizer")
        self._base_optimizer = engine.optimizer if self._is_plain else engine.optimizer.optimizer

    def write(self, folder: Path) -> Hashes:
        """Writes this rank's parts. Returns size and SHA-256 of each file."""
        if not self._moments:
            log.warning("checkpoints do not hold this optimizer's moments: on resume they start again")
        return self._write_files(folder, STEM, self._read)

    def write_values(self, folder: Path, stem: str) -> Hashes:
        """Writes only the values that the optimizer holds now, into files that start with `stem`."""
        return self._write_files(folder, stem, lambda parameter: {"value": self._read_value(parameter)})

    def _write_files(self, folder: Path, stem: str, read: Callable[[nn.Parameter], Tensors]) -> Hashes:
        hashes: Hashes = {}
        flat = None if self._flat is None else read(self._flat.whole)
        for number, names in enumerate(self._parts()):
            tensors: Tensors = {}
            for name in names:
                whole = read(self._parameters[name]) if flat is None else self._part_of(flat, name)
                if number % world_size() == rank():
                    tensors |= {f"{name}/{key}": value.cpu().contiguous() for key, value in whole.items()}
            if tensors:
                content = save(tensors)
                file = f"{stem}-{number:05d}.safetensors"
                write_file(folder / file, content)
                hashes[file] = (len(content), hashlib.sha256(content).hexdigest())
        return hashes

    def load(self, folder: Path, files: Iterable[str]) -> None:
        """Sets values and moments to those that `write` wrote. Skips other `files`.

        The optimizer must have taken a step before, because its first step makes the moments.

        Raises:
            ValueError: the parameters are not those of this model.
        """
        own = weight_files(files)
        self._load_files(folder, own, ("value", "step", *self._moments), self._read, self._write)
        if not self._moments:
            self._base_optimizer.state.clear()

    def load_values(self, folder: Path, files: Iterable[str]) -> None:
        """Sets the optimizer's values to those that `write_values` wrote. Changes nothing else.

        Raises:
            ValueError: the parameters are not those of this model.
        """
        self._load_files(
            folder,
            files,
            ("value",),
            lambda parameter: {"value": self._read_value(parameter)},
            lambda parameter, whole: self._write_value(parameter, whole["value"]),
        )

    def _load_files(
        self,
        folder: Path,
        files: Iterable[str],
        keys: Sequence[str],
        read: Callable[[nn.Parameter], Tensors],
        write: Callable[[nn.Parameter, Tensors], None],
    ) -> None:
        missing = set(self._shapes)
        flat = None if self._flat is None else read(self._flat.whole)
        for file in sorted(files):
            with safe_open(folder / file, framework="pt") as tensors:
                for name in sorted({key.rpartition("/")[0] for key in tensors.keys()}):  # noqa: SIM118
                    if name not in self._shapes:
                        raise ValueError(f"{folder}: this model has no trainable parameter {name}")
                    whole = {key: tensors.get_tensor(f"{name}/{key}") for key in keys}
                    if whole["value"].shape != self._shapes[name]:
                        raise ValueError(
                            f"{folder}: {name} has shape {tuple(whole['value'].shape)}, "
                            f"this model's is {tuple(self._shapes[name])}"
                        )
                    if flat is None:
                        write(self._parameters[name], whole)
                    else:
                        for key, value in self._part_of(flat, name).items():
                            value.copy_(whole[key])
                        flat |= {key: value for key, value in whole.items() if key == "step"}
                    missing.discard(name)
        if missing:
            raise ValueError(f"{folder}: the trainable parameter {min(missing)} is not in it")
        if self._flat is not None and flat is not None:
            write(self._flat.whole, flat)
            self._flat.link()

    def _part_of(self, flat: Tensors, name: str) -> Tensors:
        """Returns one parameter's part of the flat parameter's state, as views.

        All parameters share one step count, so that one is copied.
        """
        assert self._flat is not None
        place = self._flat.places[name]
        return {k: value.clone() if k == "step" else place.view(value) for k, value in flat.items()}

    def _parts(self) -> Iterator[list[str]]:
        """Groups the parameters' names into parts. A part ends when it reaches PART_BYTES."""
        part: list[str] = []
        n_bytes = 0
        for name in self._shapes:
            part.append(name)
            n_bytes += self._shapes[name].numel() * 4 * (1 + len(MOMENTS))
            if n_bytes >= PART_BYTES:
                yield part
                part, n_bytes = [], 0
        if part:
            yield part

    def stepped(self) -> list[torch.Tensor]:
        """Returns the fp32 tensors that this rank's optimizer steps on, in a fixed order.

        The list is empty before the first step.
        """
        return list(self._base_optimizer.state)

    def renew_working_copies(self) -> None:
        """Sets the weights that forward passes read to the values that the optimizer holds."""
        if not self._is_plain:
            for parameter in [self._flat.whole] if self._flat is not None else self._parameters.values():
                self._write_working_copy(parameter, self._read_value(parameter))

    def _read_value(self, parameter: nn.Parameter) -> torch.Tensor:
        if self._is_plain:
            return parameter.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        whole: torch.Tensor = safe_get_full_fp32_param(parameter)
        return whole

    def _read(self, parameter: nn.Parameter) -> Tensors:
        if self._is_plain:
            state = self._base_optimizer.state[parameter]
            moments = {key: state.get(key, torch.zeros_like(parameter)) for key in self._moments}
            step = torch.tensor(float(state.get("step", 0.0)))
            return {"value": self._read_value(parameter), **moments, "step": step}
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in self._moments}
        step = torch.tensor(float(next(self._deepspeed_states())["step"]))
        return {"value": self._read_value(parameter), **moments, "step": step}

    def _write(self, parameter: nn.Parameter, whole: Tensors) -> None:
        if self._is_plain:
            state = self._base_optimizer.state[parameter]
            state["step"] = whole["step"].clone()
            for key in self._moments:
                state[key] = whole[key].to(parameter.device, copy=True)
        else:
            for state in self._deepspeed_states():
                n_steps = float(whole["step"])
                state["step"] = torch.tensor(n_steps) if torch.is_tensor(state["step"]) else int(n_steps)
            self._write_working_copy(parameter, whole["value"])
            self._write_moments(parameter, whole)
        self._write_value(parameter, whole["value"])

    def _write_value(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Sets the value that the optimizer steps on."""
        if self._is_plain:
            parameter.data.copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self._zero_stage == 3:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def _write_moments(self, parameter: nn.Parameter, whole: Tensors) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for key in self._moments:
            if self._zero_stage == 3:
                safe_set_local_optimizer_state(parameter, self._own_part(parameter, whole[key]), key)
            else:
                safe_set_full_optimizer_state(parameter, whole[key].to(parameter.device), key)

    def _write_working_copy(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Sets the weight that forward passes read, in the model's own dtype. The optimizer's copy stays."""
        context: AbstractContextManager[Any] = nullcontext()
        if self._zero_stage == 3:
            import deepspeed

            context = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        with context:
            if self._zero_stage < 3 or rank() == 0:
                parameter.data.copy_(value)

    def _own_part(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of a whole tensor under ZeRO-3, padded so that all parts are equal.

        DeepSpeed's own setter of whole tensors fails if the number of ranks does not divide a tensor.
        """
        n_own, flat = parameter.ds_tensor.numel(), whole.flatten()  # type: ignore[attr-defined]
        padded = nn.functional.pad(flat, (0, n_own * world_size() - flat.numel()))
        return padded[rank() * n_own :][:n_own]

    def _deepspeed_states(self) -> Iterator[dict[str, Any]]:
        """Yields Adam's states of DeepSpeed's flat tensors. All have the same step count."""
        return (state for state in self._base_optimizer.state.values() if "step" in state)
