"""Decides whether a run records its trunk as CUDA graphs, and proves the recordings before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_max_int
from llm2vec_ds.engine.deepspeed_engine import Engine
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.graphs.proof import prove
from llm2vec_ds.model.graphs.recorder import CudaRecorder
from llm2vec_ds.model.graphs.suitable import cannot_be_recorded, is_busy
from llm2vec_ds.model.graphs.trunk import GraphedTrunk
from llm2vec_ds.model.hidden_states import seeded_hidden_states
from llm2vec_ds.model.recomputation import runs_layers_twice
from llm2vec_ds.objectives.base import Stage
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)

SAMPLE_TEXTS = 8


def use_graphs(recipe: Recipe, stage: Stage, engine: Engine) -> GraphedTrunk | None:
    """Replaces the encoder's passes by recordings, if `model.cuda_graphs` and the run allow it.

    All ranks call it together and come to the same decision.

    Returns:
        The recorded trunk. None if the run does without.

    Raises:
        UserError: `model.cuda_graphs` is `on`, but the trunk cannot be recorded.
    """
    encoder, asked = stage.encoder, recipe.model.cuda_graphs
    on_cuda = encoder.device.type == "cuda"
    # Eager passes draw their dropout as recorded ones do. So a run does not depend on recordings.
    if on_cuda and not runs_layers_twice(encoder.trunk):
        encoder.run_trunk = partial(seeded_hidden_states, encoder.trunk)
    if asked == "off":
        return None
    obstacle = reason = _obstacle(recipe, stage, engine)
    if obstacle is None:
        graphed = GraphedTrunk(
            encoder.trunk,
            CudaRecorder(encoder.device),
            longest=recipe.batch.micro_batch_tokens,
            longest_text=recipe.data.max_tokens,
            places=engine.addresses or (lambda: None),
        )
        reason = _disproof(stage, engine, graphed)
        if reason is None:
            encoder.run_trunk = graphed
            return graphed
    if asked == "on":
        raise UserError(f"model.cuda_graphs is on, but {reason}: set it to off or auto")
    level = logging.WARNING if obstacle is None else logging.INFO if on_cuda else logging.DEBUG
    log.log(level, "CUDA graphs: not used, %s", reason)
    return None


def _obstacle(recipe: Recipe, stage: Stage, engine: Engine) -> str | None:
    """Says why the trunk cannot be recorded, or why that does not pay. All ranks get the same answer.

    None: it can be recorded, as far as is known, and it pays.
    """
    trunk, device = stage.encoder.trunk, stage.encoder.device
    if device.type != "cuda":
        return f"the device is {device}"
    if engine.addresses is None:
        return (
            "only adapters that train as one tensor can be recorded (not under ZeRO-3, with full fine-tuning "
            "or with an 8-bit optimizer)"
        )
    if reason := cannot_be_recorded(trunk):
        return reason
    n_weights = sum(parameter.numel() for parameter in trunk.parameters())
    if recipe.model.cuda_graphs == "auto" and is_busy(n_weights, recipe.batch.micro_batch_tokens):
        return f"{n_weights / 1e9:.1f} billion weights keep the GPU busy for longer than Python needs"
    return None


def _disproof(stage: Stage, engine: Engine, graphed: GraphedTrunk) -> str | None:
    """Compares replays with eager passes, and says why recordings cannot be used.

    None: they give the same results on every rank.
    """
    engine.train()
    reason = None
    try:
        proof = prove(stage.encoder.trunk, graphed, _sample_batches(stage))
        if graphed.is_full:
            reason = "memory is full"
        elif not proof.holds:
            reason = f"replays differ from eager passes by {proof.error:.1e} in {proof.worst}"
        else:
            log.info("CUDA graphs: replays give the gradients of eager passes %s", proof)
    except Exception as error:  # of any kind: the run can go on without recordings
        reason = f"recording failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    failed = all_reduce_max_int(int(reason is not None), stage.encoder.device)
    return reason or ("another rank cannot record" if failed else None)


def _sample_batches(stage: Stage) -> list[PackedBatch]:
    """Two micro-batches of the first texts of the run. A text alone always fits into a micro-batch."""
    texts = [stage.text(int(row)) for row in stage.global_batch(0)[:SAMPLE_TEXTS]]
    halves = texts[: (len(texts) + 1) // 2], texts[len(texts) // 2 :]
    return [
        stage.sample_batch(_fitting(half, stage.micro_batch_tokens)).to(stage.encoder.device)
        for half in halves
    ]


def _fitting(texts: Sequence[TokenizedText], n_tokens: int) -> list[TokenizedText]:
    """Those of the texts, in order, that fit together into `n_tokens`."""
    kept: list[TokenizedText] = []
    for text in texts:
        if sum(map(len, kept)) + len(text) <= n_tokens:
            kept.append(text)
    return kept
