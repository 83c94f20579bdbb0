"""MTEB 2.x (Muennighoff et al., 2023, arXiv 2210.07316; Enevoldsen et al., 2025, arXiv 2502.13595).

This module imports mteb. Commands import it only when they run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.evaluate.identity import model_name, result_key, weights_key
from llm2vec_ds.evaluate.scores_file import OF_MTEB, SCORES_FILE, read_scores
from llm2vec_ds.evaluate.shards import RankEncoder
from llm2vec_ds.storage.durable import replace_json, replace_text
from llm2vec_ds.storage.reading import read_yaml_mapping
from llm2vec_ds.storage.tables import markdown_table

log = logging.getLogger(__name__)

DIGITS = 6
"""mteb rounds stored scores to this many digits. We do too, so a measured score equals a stored one."""


@dataclass(frozen=True)
class Score:
    """A task's main score, between 0 and 1. A correlation is between −1 and 1."""

    task: str
    type: str
    metric: str
    value: float


class MtebEncoder(AbsEncoder):
    """Our encoder with mteb's interface.

    Vectors do not depend on mteb's batch size, because all texts of a call are packed by token count.
    """

    def __init__(self, encoder: RankEncoder, meta: ModelMeta, instructions: Mapping[str, str] | None) -> None:
        """Args: instructions: by task. They replace those of mteb's metadata. None: no instructions."""
        self.model = None
        self.encoder = encoder
        self.mteb_model_meta = meta
        self.instructions = instructions

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Returns the vectors, `[N, D]` fp32, not normalised."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.encoder.encode(texts, self.instruction(task_metadata, prompt_type))

    def instruction(self, task: Any, prompt_type: PromptType | None) -> str | None:
        """Returns the task's instruction for queries and for tasks without sides. Documents get none."""
        if self.instructions is None or prompt_type == PromptType.document:
            return None
        prompt = self.instructions.get(task.name, task.prompt)
        if isinstance(prompt, dict):
            prompt = prompt.get("query")
        return f"{prompt.strip().rstrip('.:')}:" if prompt else None


def read_instructions(file: str | None) -> dict[str, str] | None:
    """Reads a JSON or YAML file `{task: instruction}`.

    Args:
        file: the file. `none`: no instructions. None: only those of mteb.

    Raises:
        UserError: there is no such file, or it has another form.
    """
    if file is None:
        return {}
    if file == "none":
        return None
    what, remedy = f"--instructions {file}", "give a JSON or YAML file of instructions by task"
    values = read_yaml_mapping(Path(file), what, "task names to instructions", remedy)
    if wrong := [name for name, value in values.items() if not isinstance(value, str)]:
        raise UserError(f"{what}: the instruction of {wrong[0]!r} is no text")
    return values


def model_meta(model: str, encoder: RankEncoder, instructions: Mapping[str, str] | None) -> ModelMeta:
    """Returns the model's metadata for mteb.

    The revision changes with everything that changes vectors. So stored results always belong to this model.
    """
    trunk, settings = encoder.encoder.trunk, encoder.encoder.settings
    parts = [
        weights_key(model),
        getattr(trunk.config, "_commit_hash", None),
        encoder.encoder.causal,
        str(trunk.dtype),
        vars(settings),
        None if instructions is None else dict(instructions),
    ]
    return ModelMeta.create_empty(
        {
            "name": model_name(model),
            "revision": result_key(*parts),
            "embed_dim": encoder.encoder.dimensions,
            "max_tokens": settings.max_tokens,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch"],
            "use_instructions": instructions is not None,
        }
    )


def evaluate_mteb(encoder: MtebEncoder, tasks: list[Any], output: Path) -> list[Score]:
    """Runs the tasks that `output` does not hold yet. Results have mteb's layout, in `output/results`.

    Raises:
        UserError: a data set cannot be loaded, or `output` cannot be written.
    """
    with writing(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
        cache = mteb.ResultCache(output)
    scores = []
    for task in tasks:
        _drop_result_of_other_data(cache, task, encoder.mteb_model_meta)
        with writing(f"--output {output}"):
            score = measure(encoder, task, cache)
        scores.append(score)
        log.info("%s: %s %.4f", score.task, score.metric, score.value)
    return scores


def measure(encoder: MtebEncoder, task: Any, cache: Any | None) -> Score:
    """Returns one task's score. Uses the result in `cache` (mteb's `ResultCache`) if there is one.

    Raises:
        UserError: its data cannot be loaded, or its score is not a number.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        results = mteb.evaluate(encoder, task, cache=cache, co2_tracker=False, show_progress_bar=False)
    except (
        ConnectionError,
        DatasetNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    ) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(
            f"{task.metadata.name}: its data cannot be loaded from the hub ({cause}): connect to the "
            "network, or download it into the Hugging Face cache first"
        ) from None
    value = round(float(results.task_results[0].get_score()), DIGITS)
    if not math.isfinite(value):
        raise UserError(
            f"{task.metadata.name}: its score is not a number, which happens if all vectors or all scores "
            "are equal: check the model and the data"
        )
    return Score(task.metadata.name, task.metadata.type, task.metadata.main_score, value)


def _drop_result_of_other_data(cache: Any, task: Any, meta: Any) -> None:
    """Removes a stored result if the data have changed. mteb itself would use it."""
    try:
        stored = cache.load_task_result(task.metadata.name, meta)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # mteb's errors for damage
        log.warning("%s: the stored result is damaged, measuring again", task.metadata.name)
        cache.get_task_result_path(task.metadata.name, meta).unlink()
        return
    if stored is not None and stored.dataset_revision != task.metadata.revision:
        log.info("%s: the data have changed, measuring again", task.metadata.name)
        cache.get_task_result_path(task.metadata.name, meta).unlink()


def summary(model: str, meta: ModelMeta, scores: list[Score]) -> dict[str, Any]:
    """Returns what `--json` prints: each task's main score, the mean by type, and the mean of all tasks."""
    tasks = {
        score.task: {"type": score.type, "metric": score.metric, "main_score": score.value}
        for score in scores
    }
    return {"model": model, "revision": meta.revision, "mteb": mteb.__version__, **_with_means(tasks)}


def _with_means(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    by_type: dict[str, list[float]] = {}
    for task in tasks.values():
        by_type.setdefault(task["type"], []).append(task["main_score"])
    return {
        "tasks": tasks,
        "mean_by_type": {kind: float(np.mean(values)) for kind, values in by_type.items()},
        "mean": float(np.mean([task["main_score"] for task in tasks.values()])),
    }


def table(result: Mapping[str, Any]) -> str:
    """Returns the summary as a Markdown table."""
    rows = [
        [name, task["type"], task["metric"], f"{task['main_score']:.4f}"]
        for name, task in result["tasks"].items()
    ]
    if len(rows) > 1:
        means = {**result["mean_by_type"], "all tasks": result["mean"]}
        rows += [["mean", kind, "", f"{value:.4f}"] for kind, value in means.items()]
    return markdown_table(["task", "type", "metric", "score"], rows)


def write_summary(result: Mapping[str, Any], output: Path) -> None:
    """Writes `scores.json` and `scores.md` beside mteb's own results.

    They keep the tasks that an earlier run wrote, if the model, its revision and mteb's version are the same.

    Raises:
        UserError: an earlier `scores.json` is damaged, or the files cannot be written.
    """
    earlier = read_scores(output, OF_MTEB) or {}
    if all(earlier.get(name) == result[name] for name in ("model", "revision", "mteb")):
        result = {**result, **_with_means({**earlier["tasks"], **result["tasks"]})}
    with writing(f"--output {output}"):
        replace_json(output / SCORES_FILE, result)
        replace_text(output / "scores.md", f"{result['model']}\n\n{table(result)}\n")
