"""Prints a plan as a JSON object or as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llm2vec_ds.planner.plan import FRAGMENTATION, GIB, RESERVED, Planner
from llm2vec_ds.planner.step_time import UTILISATION, Fit

MEANINGS = {
    "weights": "frozen weights, scales of NF4 included",
    "adapters": "weights that train, in the device's dtype",
    "gradients": "most gradients held at once",
    "optimizer": "both moments; fp32 copy, moving average (if any)",
    "buffers": "DeepSpeed's buckets, gathered weights",
    "activations": "kept for backward by one micro-batch",
    "temporaries": "most bytes on top of the activations",
    "logits_chunk": "largest chunk of logits: part of the temporaries",
    "embedding_bank": "a step's vectors while the loss runs",
    "graphs": "outputs of recorded passes (CUDA graphs)",
    "reserved": "libraries (CUDA or Python), fragmentation",
}


def as_json(planner: Planner, fit: Fit | None = None) -> dict[str, Any]:
    """Returns everything that `llm2vec-ds plan --json` prints, in bytes unless a name says otherwise.

    Args:
        fit: speed fitted to measured steps. None: the step's time rests on assumptions.
    """
    recipe, load, machine = planner.recipe, planner.load, planner.machine
    memory = planner.memory(recipe.deepspeed)
    choices = planner.choices()
    fitting = [choice for choice in choices if choice.fits]
    time = planner.step_time(fit.speed if fit else None)
    largest_batch = planner.largest_global_batch()
    return {
        "stage": recipe.stage,
        "machine": {**machine.model_dump(), "interconnect_gbps": planner.bandwidth_gbps()},
        "parameters": planner.shapes.n_parameters,
        "trainable_parameters": sum(shape.numel() for shape in planner.shapes.trainable),
        "dtype": str(planner.shapes.dtype).removeprefix("torch."),
        "quantization": recipe.model.quantization,
        "deepspeed": recipe.deepspeed,
        "step": {
            "texts_per_rank": load.texts,
            "tokens_per_text": load.tokens_per_text,
            "micro_batches": load.micro_batches,
            "tokens_per_micro_batch": load.texts_per_pass * load.tokens_per_text,
        },
        "memory_bytes": asdict(memory),
        "limit_bytes": planner.limit(),
        "fits": memory.peak <= planner.limit(),
        "choices": [asdict(choice) for choice in choices],
        "use": fitting[0].deepspeed if fitting else None,
        "some_choice_fits": bool(fitting),
        "largest_token_budget": planner.largest_token_budget(),
        "largest_global_batch": largest_batch,
        "largest_in_batch_negatives": _negatives(planner, largest_batch),
        "sent_bytes_per_step": planner.sent_bytes(recipe.deepspeed),
        "step_ms": None
        if time is None
        else {"compute": time.compute_ms, "communication": time.communication_ms, "total": time.total_ms},
        "step_time_fit": asdict(fit) if fit else None,
        "assumptions": assumptions(planner, fit),
    }


def _negatives(planner: Planner, global_batch: int | None) -> int | None:
    """Returns the negatives of a query: the documents of all ranks without its own positive.

    None if ranks exchange no documents.
    """
    if global_batch is None or not planner.load.documents:
        return None
    return max(0, global_batch * planner.load.documents // planner.load.rows - 1)


def assumptions(planner: Planner, fit: Fit | None = None) -> list[str]:
    """Returns the assumptions behind the figures, for the user."""
    device, machine = planner.device.type, planner.machine
    lines = [
        f"every text has data.max_tokens = {planner.load.tokens_per_text} tokens",
        f"{RESERVED[device] / GIB:.2f} GiB and {FRAGMENTATION:.0%} of the tensors' size are added for "
        "libraries and fragmentation",
        "attention runs as a fused kernel, without a score matrix"
        if device == "cuda"
        else "attention runs in torch; with attention dropout it holds the weights of every pair",
    ]
    if fit is not None:
        lines.append(_fitted_to(fit))
    elif device == "cuda":
        lines.append(
            f"a GPU reaches {UTILISATION:.0%} of {machine.tflops:g} TFLOP/s, and the optimizer and reading "
            "NF4 take no time"
        )
    if device == "cuda":
        lines.append(
            f"each GPU sends at {planner.bandwidth_gbps():g} Gb/s, and sending does not overlap with compute"
        )
    return lines


def _fitted_to(fit: Fit) -> str:
    text = (
        f"the step's time is fitted to {fit.n_steps} steps of {fit.n_runs} measured run(s): "
        f"{fit.speed.operations_per_s / 1e12:.3g} TFLOP/s and {fit.speed.pass_s * 1e3:.0f} ms a pass. "
        f"The error is at most {fit.median_error:.0%} for half of the steps, and at most "
        f"{fit.error_of_90_percent:.0%} for nine of ten"
    )
    if fit.left_out_error is None:
        return text
    return f"{text}. For half of the steps of a run that the fit has not seen: {fit.left_out_error:.0%}"


def as_table(plan: dict[str, Any]) -> str:
    """Returns the plan as text for people."""
    machine, step, memory = plan["machine"], plan["step"], plan["memory_bytes"]
    place = (
        f"{machine['nodes']} node(s) × {machine['gpus_per_node']} GPU(s) of {machine['memory_gib']:g} GiB"
        if machine["gpus_per_node"]
        else f"one CPU process, {machine['memory_gib']:g} GiB"
    )
    held = plan["quantization"] or plan["dtype"]
    lines = [
        f"{plan['stage']} on {place}: {plan['parameters'] / 1e6:,.1f} M parameters, "
        f"of which {plan['trainable_parameters'] / 1e6:,.1f} M train; {held}; "
        f"{plan['deepspeed'] or 'no DeepSpeed JSON'}",
        f"a rank's step: {step['micro_batches']} micro-batch(es) of "
        f"{step['tokens_per_micro_batch']:,} tokens",
        "",
    ]
    lines += [f"{name:15} {memory[name] / GIB:9.3f} GiB  {text}" for name, text in MEANINGS.items()]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    lines += [
        f"{'peak':15} {memory['peak'] / GIB:9.3f} GiB  of {machine['memory_gib']:g}: {verdict}",
        f"{'host':15} {memory['host'] / GIB:9.3f} GiB  offloaded, for each rank",
        "",
        f"{'deepspeed':33} {'peak GiB':>9} {'host GiB':>9} {'sent MB':>10}",
    ]
    for choice in plan["choices"]:
        mark = "fits" if choice["fits"] else "too much"
        lines.append(
            f"{choice['deepspeed'] or 'null':33} {choice['peak'] / GIB:9.2f} {choice['host'] / GIB:9.2f} "
            f"{choice['sent_bytes'] / 1e6:10,.0f}  {mark}"
        )
    lines += ["", _advice(plan)]
    if time := plan["step_ms"]:
        lines.append(
            f"a step: about {time['total']:,.0f} ms ({time['compute']:,.0f} compute, "
            f"{time['communication']:,.0f} communication)"
        )
    return "\n".join([*lines, "assumed: " + "; ".join(plan["assumptions"])])


def _advice(plan: dict[str, Any]) -> str:
    if not plan["some_choice_fits"]:
        budget = plan["largest_token_budget"]
        fix = f"batch.micro_batch_tokens={budget}" if budget else "model.quantization=nf4, or more GPUs"
        return f"nothing here fits: try {fix}, or model.activation_checkpointing=full"
    advice = f"use deepspeed={plan['use'] or 'null'}; largest values with {plan['deepspeed'] or 'no JSON'}: "
    advice += f"batch.micro_batch_tokens={plan['largest_token_budget']}"
    if plan["largest_global_batch"] is not None:
        advice += f", batch.global_batch_size={plan['largest_global_batch']}"
    if plan["largest_in_batch_negatives"] is not None:
        advice += f" ({plan['largest_in_batch_negatives']:,} negatives for a query)"
    return advice
