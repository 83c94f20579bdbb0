"""`llm2vec-ds demo`: takes a real LLM through LLM2Vec and measures it after every step.

It prepares text, writes ordinary recipes and runs them with the ordinary command. So you can repeat and
change by hand what it does.
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from llm2vec_ds.demo.model import demo_model_dir
from llm2vec_ds.demo.recipes import BUDGETS, last_stage, write_recipes
from llm2vec_ds.demo.text import held_out_retrieval, training_text
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import ENCODER, HELD_OUT
from llm2vec_ds.engine.metrics import training_totals
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.evaluate.retrieval import RetrievalSet, ndcg_at_10
from llm2vec_ds.evaluate.sts import GradedPairs, load_graded_pairs, own_graded_pairs, sts_spearman
from llm2vec_ds.model.first_layers import check_can_be_cut
from llm2vec_ds.model.quantization import check_bitsandbytes
from llm2vec_ds.objectives.teacher_model import load_teacher
from llm2vec_ds.process.child_command import train_in_child
from llm2vec_ds.process.versions import versions_of
from llm2vec_ds.report.stages_plot import plot_stages
from llm2vec_ds.storage.durable import replace_json
from llm2vec_ds.storage.output_folder import (
    check_no_foreign,
    check_reads_no_output,
    check_replaceable,
    replaced_folder,
)
from llm2vec_ds.storage.reading import read_json_lines

log = logging.getLogger(__name__)


PACKAGES = ("torch", "transformers", "deepspeed", "peft")
WRITTEN = (
    *("paragraphs.txt", "held_out.txt", "sentences.txt", "mntp.yaml", "simcse.yaml", "distil.yaml"),
    *("simcse", "distil", "encoder", "stages.png"),
)
"""What a demo writes into its folder. It also writes mntp/ at the start and metrics.json at the end."""


def run_demo(
    output: Path,
    *,
    budget: str = "default",
    sts: Path | None = None,
    text: Path | None = None,
    model: str | None = None,
    seed: int = 42,
    qlora: bool = False,
    teacher: str | None = None,
    simcse: bool = False,
) -> dict[str, Any]:
    """Runs causal baseline → bidirectional → MNTP → distillation from the model's own first layer.

    Another `teacher` or `simcse` may take the place of the first layer. With `qlora` both stages train over
    NF4. All measurements use full-precision weights. Those of a trained encoder are dequantised from NF4.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: an input is unusable, or `output` already holds a demo.
    """
    _check(output, budget, qlora, text, teacher, simcse)
    pairs = load_graded_pairs(sts) if sts else own_graded_pairs()
    material = training_text(text)
    retrieval = held_out_retrieval()
    with writing(f"--output {output}"):
        (output / "mntp").mkdir(parents=True, exist_ok=True)
    base = model or str(demo_model_dir())
    started = time.monotonic()
    last, quantization = last_stage(base, teacher, simcse), "nf4" if qlora else None
    recipes = write_recipes(output, base, material, BUDGETS[budget], seed, quantization, last)

    def measure(name: str, folder: str | Path, causal: bool = False) -> dict[str, float]:
        encoder = Encoder.from_pretrained(folder, causal=causal)
        if teacher is None and not simcse:
            check_can_be_cut(encoder.trunk)  # now, not after MNTP
        return _measure(name, encoder, pairs, retrieval)

    metrics: dict[str, Any] = {
        "causal": measure("causal", base, causal=True),
        "bidirectional": measure("bidirectional", base),
    }
    for stage, recipe in recipes.items():
        train_in_child(recipe)
        metrics[stage] = measure(stage, output / stage / ENCODER) | _trained(output / stage)
    metrics["run"] = {
        "budget": budget,
        "seed": seed,
        "quantization": quantization,
        "model": Path(base).name,
        "teacher": last.teacher,
        **_files(sts, text),
        "elapsed_s": round(time.monotonic() - started, 1),
        "python": platform.python_version(),
        **versions_of(PACKAGES),
    }
    _publish(output, last.stage, metrics, f"{Path(base).name}, {budget} budget{', NF4' if qlora else ''}")
    return metrics


def _publish(output: Path, last: str, metrics: dict[str, Any], title: str) -> None:
    """Writes the last stage's encoder, the picture and metrics.json, which comes last."""
    with replaced_folder(output / ENCODER, f"--output {output}: its encoder/") as new:
        shutil.copytree(output / last / ENCODER, new, dirs_exist_ok=True)
    plot_stages(metrics, output / "stages.png", title)
    replace_json(output / "metrics.json", metrics)
    places = (output / name for name in ("encoder", "metrics.json", "stages.png"))
    log.info("encoder: %s, scores: %s, picture: %s", *places)


def _files(sts: Path | None, text: Path | None) -> dict[str, str]:
    return {
        "sts": sts.name if sts else "sentence_pairs.csv",
        "text": text.name if text else "pydoc_data.topics",
    }


def _check(
    output: Path, budget: str, qlora: bool, text: Path | None, teacher: str | None, simcse: bool
) -> None:
    if simcse and teacher is not None:
        raise UserError("--simcse and --teacher exclude each other: give one of them")
    if budget not in BUDGETS:
        raise UserError(f"--budget {budget!r} is not one of {', '.join(BUDGETS)}")
    if (output / "metrics.json").exists():
        raise UserError(f"{output} already holds a demo: choose another --output or remove it")
    what = f"--output {output}"
    check_reads_no_output([output / name for name in WRITTEN], [text] if text else [], what)
    check_no_foreign(output, what, WRITTEN, marks=["mntp"])
    check_replaceable(output / ENCODER, f"{what}: its encoder/")
    if qlora:
        check_bitsandbytes("--qlora")
    if teacher is not None:  # a mistake shows now, not after MNTP
        load_teacher(teacher, "--teacher", None, torch.device("cpu"))


def _measure(name: str, encoder: Encoder, pairs: GradedPairs, retrieval: RetrievalSet) -> dict[str, float]:
    scores = {
        "sts_spearman": sts_spearman(encoder, pairs, progress=True),
        "retrieval_ndcg_at_10": ndcg_at_10(encoder, retrieval, progress=True),
    }
    log.info("%-13s STS Spearman %.4f, retrieval nDCG@10 %.4f", name, *scores.values())
    return scores


def _trained(folder: Path) -> dict[str, Any]:
    """Returns what the run itself logged: tokens, speed, and held-out measurements at its start and end."""
    totals = training_totals(folder)
    result: dict[str, Any] = {
        "steps": totals.steps,
        "trained_tokens": totals.trained_tokens,
        "tokens_per_s": round(totals.trained_tokens / totals.training_s, 1),
    }
    held_out = folder / HELD_OUT
    if held_out.exists():
        rows = list(read_json_lines(held_out, dict[str, Any], "train again"))
        result["held_out"] = {"before": rows[0], "after": rows[-1]}
    return result
