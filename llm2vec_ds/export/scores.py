"""An encoder's scores in its model card: as a table, and as the hub's `model-index`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.reading import read_json
from llm2vec_ds.storage.tables import markdown_table


@dataclass(frozen=True)
class Score:
    """One score. `type` is the hub's name of the task type, `data` the name of the data set."""

    type: str
    data: str
    metric: str
    value: float


DEMO = {
    "sts_spearman": ("STS", "spearman", "sts"),
    "retrieval_ndcg_at_10": ("Retrieval", "ndcg_at_10", "text"),
}
"""For each figure of the demo: the task type, the metric, and the key of `run` that names the data."""


@dataclass(frozen=True)
class _Task:
    """One task in `scores.json`."""

    type: str
    metric: str
    main_score: float


def demo_scores(metrics: dict[str, Any]) -> list[Score]:
    """Returns the scores after the last stage, from a demo's `metrics.json`."""
    run = metrics.get("run", {})
    last = [values for stage, values in metrics.items() if stage != "run"][-1:]
    return [
        Score(task, str(run.get(data, "unknown")), metric, float(values[name]))
        for values in last
        for name, (task, metric, data) in DEMO.items()
        if name in values
    ]


def mteb_scores(file: Path) -> tuple[Score, ...]:
    """Reads the scores from the `scores.json` that `evaluate mteb` writes.

    Raises:
        UserError: the file is missing, or cannot be read.
    """
    if not file.is_file():
        raise UserError(f"--scores {file} not found: give the scores.json of llm2vec-ds evaluate mteb")
    found = read_json(file, _Summary, "measure again with llm2vec-ds evaluate mteb")
    return tuple(Score(task.type, name, task.metric, task.main_score) for name, task in found.tasks.items())


@dataclass(frozen=True)
class _Summary:
    tasks: dict[str, _Task]


def model_index(name: str, scores: list[Score]) -> list[dict[str, Any]]:
    """Returns the scores as the hub reads them from a card's front matter."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = [
        EvalResult(
            task_type=score.type,
            dataset_type=score.data,
            dataset_name=score.data,
            metric_type=score.metric,
            metric_value=round(score.value, 6),
        )
        for score in scores
    ]
    return eval_results_to_model_index(name, results)


def stage_table(metrics: dict[str, Any]) -> str:
    """Returns the demo's figures after each stage, as a Markdown table."""
    run = metrics.get("run", {})
    figures = {
        stage: {name: value for name, value in values.items() if isinstance(value, float)}
        for stage, values in metrics.items()
        if stage != "run"
    }
    names = list(
        dict.fromkeys(name for found in figures.values() for name in found if name != "tokens_per_s")
    )
    rows = [
        [stage, *(f"{found[name]:.4f}" if name in found else "–" for name in names)]
        for stage, found in figures.items()
    ]
    versions = ", ".join(f"{n} {run[n]}" for n in ("python", "torch", "transformers") if n in run)
    return f"{markdown_table(['after', *names], rows)}\n\nMeasured on {run.get('sts', '?')}; {versions}."


def score_table(scores: Iterable[Score]) -> str:
    """Returns the scores as a Markdown table."""
    rows = [[s.type, s.data, s.metric, f"{s.value:.4f}"] for s in scores]
    return markdown_table(["task", "data", "metric", "score"], rows)
