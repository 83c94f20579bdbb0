"""Reads what a report shows from folders: training runs, scores, encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from llm2vec_ds.encoder.of_run import ENCODER, HELD_OUT, METRICS, RECIPE, short_name
from llm2vec_ds.errors import UserError
from llm2vec_ds.report.stages_plot import STAGES
from llm2vec_ds.storage.reading import read_json, read_json_lines

T = TypeVar("T")

Row = dict[str, int | float | dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One training run: its stage, a row per step, held-out measurements, and the text of its recipe."""

    name: str
    stage: str
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    recipe: str


@dataclass(frozen=True)
class Curve:
    """Scores of mixtures of two encoders. `weights` are those of the second one."""

    name: str
    measured: str
    weights: list[float]
    scores: list[float]


@dataclass
class ReportData:
    """Everything that the given folders hold.

    Attributes:
        scores: by metric, then by variant: one value per seed.
        encoders: by name: folder or hub id, and whether it should use causal attention.
        facts: lines about model, hardware and versions.
    """

    runs: list[Run] = field(default_factory=list)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    encoders: dict[str, tuple[str, bool | None]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    def add_scores(self, variant: str, values: Mapping[str, Any]) -> None:
        """Adds one seed's scores of a variant."""
        for metric, value in values.items():
            if isinstance(value, (int, float)):
                self.scores.setdefault(metric, {}).setdefault(variant, []).append(float(value))


def read_folders(folders: Sequence[Path]) -> ReportData:
    """Reads training runs, ablations, demos, merged encoders, and results of `evaluate`.

    Raises:
        UserError: a folder is missing, holds nothing that can be shown, or a file in it is damaged.
    """
    data = ReportData()
    for folder, label in _labelled(folders).items():
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
        found = [read(data, folder, label) for read in (_ablation, _demo, _evaluation, _merge, _run)]
        if not any(found):
            raise UserError(
                f"{folder} holds no metrics.jsonl, results.json, metrics.json, scores.json or merge.json: "
                "give the folder of a training run, an ablation, a demo, an evaluation or a merge"
            )
    return data


def _labelled(folders: Sequence[Path]) -> dict[Path, str]:
    """Returns a label for each folder: the end of its path that no other folder shares. "" if it is alone."""
    parts = {folder: folder.absolute().parts for folder in folders}
    if len(parts) == 1:
        return dict.fromkeys(parts, "")
    n_parts = next(
        n for n in count(1) if len({own[-n:] for own in parts.values()}) == len(set(parts.values()))
    )
    return {folder: "/".join(own[-n_parts:]) for folder, own in parts.items()}


def _json(file: Path, shape: type[T]) -> T:
    return read_json(file, shape, "make it again, or leave this folder out")


def _lines(file: Path) -> list[Row]:
    if not file.exists():
        return []
    remedy = "remove the line, or leave this folder out"
    rows = list(read_json_lines(file, Row, remedy))
    if wrong := [number for number, row in enumerate(rows, 1) if "step" not in row]:
        raise UserError(f"{file}, line {wrong[0]} has no step: {remedy}")
    return rows


def _prefixed(label: str, name: str) -> str:
    return f"{label}: {name}" if label else name


def _run(data: ReportData, folder: Path, label: str, name: str = "") -> bool:
    steps = _lines(folder / METRICS)
    if not steps:
        return False
    recipe = folder / RECIPE
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else ""
    stage = next((line.split(": ")[1] for line in text.splitlines() if line.startswith("stage: ")), "run")
    shown = _prefixed(label, name or folder.name) if name else label or folder.name
    data.runs.append(Run(shown, stage, steps, _lines(folder / HELD_OUT), text))
    if not name and (folder / ENCODER).is_dir():
        data.encoders[shown] = (str(folder / ENCODER), None)
    return True


@dataclass(frozen=True)
class _Results:
    """The content of an ablation's results.json: scores by variant and seed, and how they were made."""

    scores: dict[str, dict[str, dict[str, float]]]
    model: str
    budget: str | None
    hardware: str
    versions: dict[str, str]


def _ablation(data: ReportData, folder: Path, label: str) -> bool:
    if not (folder / "results.json").exists():
        return False
    results = _json(folder / "results.json", _Results)
    for variant, by_seed in results.scores.items():
        for scores in by_seed.values():
            data.add_scores(_prefixed(label, variant), scores)
        seed = next(iter(by_seed), "")
        encoder = folder / "runs" / f"seed-{seed}" / variant / ENCODER
        path = str(encoder) if "+" in variant else results.model
        if "+" not in variant or encoder.is_dir():
            data.encoders[_prefixed(label, variant)] = (path, variant.startswith("uni"))
    for seed_folder in sorted((folder / "runs").glob("seed-*")):
        for run in sorted(path for path in seed_folder.iterdir() if path.is_dir()):
            _run(data, run, label, f"{run.name}, {seed_folder.name.replace('-', ' ')}")
    facts = {
        "model": Path(results.model).name,
        "budget": results.budget,
        "hardware": results.hardware,
    }
    facts |= results.versions
    data.facts |= {_prefixed(label, name): str(value) for name, value in facts.items() if value}
    return True


def _demo(data: ReportData, folder: Path, label: str) -> bool:
    if not (folder / "metrics.json").exists():
        return False
    metrics = _json(folder / "metrics.json", dict[str, dict[str, Any]])
    for stage in (name for name in STAGES if name in metrics):
        scores = {k: v for k, v in metrics[stage].items() if k in ("sts_spearman", "retrieval_ndcg_at_10")}
        data.add_scores(_prefixed(label, stage), scores)
        if (folder / stage / ENCODER).is_dir():
            data.encoders[_prefixed(label, stage)] = (str(folder / stage / ENCODER), None)
        if (folder / stage).is_dir():
            _run(data, folder / stage, label, stage)
    data.facts |= {_prefixed(label, k): str(v) for k, v in metrics.get("run", {}).items()}
    return True


@dataclass(frozen=True)
class _Task:
    main_score: float


@dataclass(frozen=True)
class _Words:
    accuracy_by_seed: list[float]


@dataclass(frozen=True)
class _Labels:
    column: str


@dataclass(frozen=True)
class _Scores:
    """The content of scores.json. `tasks` is from `evaluate mteb`, the other fields from `evaluate words`."""

    model: str
    tasks: dict[str, _Task] = field(default_factory=dict)
    task: _Labels = field(default_factory=lambda: _Labels("labels"))
    same_token: _Words | None = None
    next_token: _Words | None = None


def _evaluation(data: ReportData, folder: Path, label: str) -> bool:
    if not (folder / "scores.json").exists():
        return False
    result = _json(folder / "scores.json", _Scores)
    variant = label or short_name(result.model)
    data.add_scores(variant, {name: task.main_score for name, task in result.tasks.items()})
    for shift, words in (("same_token", result.same_token), ("next_token", result.next_token)):
        for accuracy in words.accuracy_by_seed if words else []:
            data.add_scores(variant, {f"{result.task.column}, {shift}": accuracy})
    return True


@dataclass(frozen=True)
class _Mixture:
    weights: list[float]
    score: float


@dataclass(frozen=True)
class _Merge:
    """The content of merge.json."""

    sources: list[str]
    weights: list[float]
    curve: list[_Mixture]
    measured: str | None = None


def _merge(data: ReportData, folder: Path, label: str) -> bool:
    if not (folder / "merge.json").exists():
        return False
    result = _json(folder / "merge.json", _Merge)
    shown = label or folder.name
    names = [short_name(source) for source in result.sources]
    if len(result.curve) > 1:
        weights, scores = zip(*((point.weights[-1], point.score) for point in result.curve), strict=True)
        name = f"{names[0]} → {names[1]}"
        data.curves.append(Curve(name, result.measured or "score", list(weights), list(scores)))
    data.encoders[shown] = (str(folder), None)
    shares = (f"{weight:g} × {name}" for weight, name in zip(result.weights, names, strict=True))
    data.facts[shown] = " + ".join(shares)
    return True
