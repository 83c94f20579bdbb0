"""Memory of a run: compares plan and measurement, says what to do when memory is full, and finds a token
budget that fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
import torch

from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_max_int, rank, world_size
from llm2vec_ds.engine.deepspeed_engine import Engine
from llm2vec_ds.engine.metrics import peak_mib
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.objectives.base import Stage
from llm2vec_ds.planner.plan import GIB, Memory, Planner
from llm2vec_ds.process.full_memory import GPU, full_memory
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import MachineConfig
from llm2vec_ds.storage.durable import replace_json

log = logging.getLogger(__name__)

MIB = 2**20


def explains_full_memory(train: Callable[..., Path]) -> Callable[..., Path]:
    """Wraps `train`: a full memory becomes a UserError that says what to lower."""

    @wraps(train)
    def explained(recipe: Recipe, *arguments: Any, **keywords: Any) -> Path:
        try:
            return train(recipe, *arguments, **keywords)
        except Exception as error:
            if full_memory(error) is None:
                raise
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            message = explain_full_memory(recipe, device, _planner(recipe, device), error)
        raise UserError(message)

    return explained


@contextmanager
def memory_report(recipe: Recipe, stage: Stage, engine: Engine, folder: Path) -> Iterator[None]:
    """Plans the memory before training, and writes `memory.json` with planned and measured peak after it.

    If the recipe allows it, the token budget shrinks until it fits.

    Raises:
        UserError: as `fit_token_budget`.
    """
    device = stage.encoder.device
    planner = _planner(recipe, device) if rank() == 0 else None
    planned = planner.memory(recipe.deepspeed) if planner else None
    if planned is not None:
        log.info("planned peak: %.0f MiB", planned_mib(planned, device))
    if recipe.batch.halve_if_out_of_memory:
        fit_token_budget(recipe, stage, engine)
    yield
    if planned is not None:
        _report(planned, device, folder)


def planned_mib(planned: Memory, device: torch.device) -> float:
    """Returns what `peak_mib` should measure: tensors on a GPU, the whole process on a CPU."""
    return (planned.peak - (planned.reserved if device.type == "cuda" else 0)) / MIB


def explain_full_memory(
    recipe: Recipe, device: torch.device, planner: Planner | None, error: BaseException
) -> str:
    """Returns one line: what is full, how much is held and was planned, and what to lower."""
    which = full_memory(error)
    parts_of_message = [f"{which} is full"]
    if which == GPU and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        held = torch.cuda.memory_allocated(device)
        parts_of_message.append(f"{held / GIB:.1f} of {total / GIB:.1f} GiB held by tensors")
    if planner is not None:
        parts = planner.memory(recipe.deepspeed)
        names = ("weights", "adapters", "optimizer", "activations", "temporaries", "embedding_bank")
        shown = ", ".join(f"{name} {getattr(parts, name) / GIB:.1f}" for name in names)
        parts_of_message.append(f"planned {parts.peak / GIB:.1f} GiB ({shown})")
    return f"{'; '.join(parts_of_message)}. {_fixes(recipe, planner)} ({' '.join(str(error).split())[:80]})"


def _fixes(recipe: Recipe, planner: Planner | None) -> str:
    budget, least = recipe.batch.micro_batch_tokens, recipe.data.max_tokens
    fitting = planner.largest_token_budget() if planner is not None else 0
    lower = max(least, min(fitting or budget // 2, budget // 2))
    fixes = []
    if lower < budget:
        fixes.append(f"batch.micro_batch_tokens={lower} (now {budget})")
    if recipe.model.activation_checkpointing != "full":
        fixes.append("model.activation_checkpointing=full")
    if recipe.model.quantization is None and recipe.adapter is not None:
        fixes.append("model.quantization=nf4")
    fixes.append("a JSON of ds_configs/ that splits or offloads more (llm2vec-ds plan shows which)")
    return f"Try {', or '.join(fixes)}"


def fit_token_budget(recipe: Recipe, stage: Stage, engine: Engine) -> None:
    """Halves the stage's token budget until one full micro-batch fits into memory on every rank.

    Tries a forward and backward pass before the first step. Gradients are neither kept nor exchanged, so a
    rank whose memory is full leaves no other waiting. After each try the ranks agree.

    Raises:
        UserError: the run uses ZeRO-3, whose passes exchange weights. Or not even one text fits.
    """
    if engine.zero_stage == 3:
        raise UserError(
            "batch.halve_if_out_of_memory does not work under ZeRO-3, where ranks wait for each other in "
            "every pass: leave it out, and see llm2vec-ds plan for a budget that fits"
        )
    least = recipe.data.max_tokens
    while all_reduce_max_int(int(not _fits(stage, recipe)), stage.encoder.device):
        if stage.micro_batch_tokens <= least:
            raise UserError(
                f"not even {least} tokens (data.max_tokens) fit into memory: lower "
                "data.max_tokens, or see llm2vec-ds plan"
            )
        stage.micro_batch_tokens = max(least, stage.micro_batch_tokens // 2)
        log.warning("memory is full: all ranks go on with %s tokens a micro-batch", stage.micro_batch_tokens)


def _fits(stage: Stage, recipe: Recipe) -> bool:
    """Says whether a full micro-batch fits into this rank's memory.

    Gradients are computed by `torch.autograd.grad` and dropped. So no hook of DeepSpeed runs.
    """
    n_texts = max(1, stage.micro_batch_tokens // recipe.data.max_tokens)
    ids = [3] * recipe.data.max_tokens
    batch = stage.sample_batch([TokenizedText(ids, 0, len(ids), 0)] * n_texts)
    parameters = [p for p in stage.model.parameters() if p.requires_grad]
    stage.model.train()
    full = False
    # A recorded pass adds to `.grad` itself and returns no gradient, so `torch.autograd.grad` would not reach
    # the parameters.
    recorded, stage.encoder.run_trunk = stage.encoder.run_trunk, None
    try:
        outcome = stage.model(batch.to(stage.encoder.device))
        torch.autograd.grad(outcome[0].sum(), parameters, allow_unused=True)
    except Exception as error:
        if full_memory(error) is None:
            raise
        full = True  # the error holds the tensors of the pass, so the cache is emptied after this block
    finally:
        stage.encoder.run_trunk = recorded
    if full and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return not full


def _planner(recipe: Recipe, device: torch.device) -> Planner | None:
    """Returns a planner for this machine. If the model cannot be planned, warns and returns None."""
    if device.type == "cuda":
        memory, gpus, nodes = torch.cuda.get_device_properties(device).total_memory, world_size(), 1
    else:
        memory, gpus, nodes = psutil.virtual_memory().total, 0, world_size()
    machine = MachineConfig(nodes=nodes, gpus_per_node=gpus, memory_gib=memory / GIB)
    try:
        with torch.random.fork_rng(devices=[]):
            return Planner(recipe, machine=machine)
    except (UserError, RuntimeError, MemoryError) as error:  # RuntimeError: an operation without a meta form
        log.warning("memory is not planned: %s", " ".join(str(error).split())[:160])
        return None


def _report(planned: Memory, device: torch.device, folder: Path) -> None:
    expected, measured = planned_mib(planned, device), peak_mib(device)
    log.info("peak memory: planned %.0f MiB, measured %.0f MiB", expected, measured)
    parts = {name: round(value / MIB, 3) for name, value in vars(planned).items()}
    values = {
        "planned_peak_mib": round(expected, 1),
        "measured_peak_mib": round(measured, 1),
        "planned_parts_mib": parts,
        "n_ranks": world_size(),
    }
    with writing(folder / "memory.json"):
        replace_json(folder / "memory.json", values)
