"""Finds the mteb tasks to run: by name, benchmark, the paper's subset, or local files in mteb's task classes.

This module imports mteb. Commands import it only when they run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from llm2vec_ds.data.prompts import is_text
from llm2vec_ds.data.row_files import COMPRESSIONS, FORMATS, BadRows, format_or_none, rows_of
from llm2vec_ds.data.sources import find_source
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.beir import FILES, read_beir
from llm2vec_ds.evaluate.pair_corpus import corpus_of_pairs
from llm2vec_ds.evaluate.sts import load_graded_pairs
from llm2vec_ds.storage.fingerprint import files_sha256, json_sha256

SUBSETS = {
    "paper15": [
        "ArguAna",
        "NFCorpus",
        "SciFact",
        "StackOverflowDupQuestions",
        "SciDocsRR",
        "BiorxivClusteringS2S",
        "MedrxivClusteringS2S",
        "TwentyNewsgroupsClustering",
        "SprintDuplicateQuestions",
        "Banking77Classification",
        "EmotionClassification",
        "MassiveIntentClassification:en",
        "STS17:en-en",
        "SICK-R",
        "STSBenchmark",
    ],
}
"""`paper15`: 15 tasks of MTEB (eng, v1) on which the paper compares its variants. The list is not confirmed,
because no public source of it was found."""

LEAST_ROWS = 5
"""Cross-validation of a classifier cuts the rows into this many parts."""
TEXTS_OF_A_FILE = 500
LOCAL = ("sts", "retrieval", "clustering", "classification")


def tasks_for(
    names: Sequence[str],
    benchmark: str | None = None,
    subset: str | None = None,
    *,
    exclude_self: bool = False,
) -> list[Any]:
    """Returns the requested tasks, in order.

    Args:
        names: `sts:FILE`, or `retrieval:`, `clustering:` or `classification:` and a file or folder, or mteb's
            name of a task, with one of its subsets if wanted (`STS17:en-en`).
        benchmark: mteb's name of a benchmark.
        subset: a key of `SUBSETS`.
        exclude_self: for `retrieval:`, do not rank a document with the query's own id.

    Raises:
        UserError: no task is requested, a name is unknown, local data are unusable, or two tasks have one
            name.
    """
    if subset is not None and subset not in SUBSETS:
        raise UserError(f"--subset {subset!r} is unknown: choose {', '.join(SUBSETS)}")
    tasks = [_task(name, exclude_self) for name in [*names, *SUBSETS.get(subset or "", [])]]
    if benchmark is not None:
        tasks += _known(mteb.get_benchmark, "--benchmark", benchmark).tasks
    if not tasks:
        raise UserError("nothing to evaluate: give --task, --benchmark or --subset")
    twice = [name for name, n in Counter(task.metadata.name for task in tasks).items() if n > 1]
    if twice:
        raise UserError(f"two tasks have the name {twice[0]}: give one of them, or rename its file")
    return tasks


def _known(get: Any, option: str, name: str) -> Any:
    try:
        return get(name)
    except KeyError as error:
        message = " ".join(str(error.args[0]).removeprefix("KeyError: ").split())
        raise UserError(f"{option} {message[:200]}") from None


def _task(name: str, exclude_self: bool) -> Any:
    kind, _, rest = name.partition(":")
    if kind in LOCAL:
        return _local(kind, Path(rest).expanduser(), exclude_self)
    try:
        task = _known(mteb.get_task, "--task", kind)
    except UserError:
        if (path := Path(name).expanduser()).exists() or format_or_none(path) is not None:
            raise _without_kind(name, path) from None
        raise
    if not rest:
        return task
    if rest not in task.hf_subsets:
        known = ", ".join(task.hf_subsets)[:200]
        raise UserError(f"--task {name}: {kind} has no subset {rest!r}: choose one of {known}")
    return mteb.get_task(kind, hf_subsets=[rest])


def _without_kind(name: str, path: Path) -> UserError:
    meant = "retrieval" if path.is_dir() else "sts"
    others = ", ".join(f"{kind}:" for kind in LOCAL if kind != meant)
    return UserError(
        f"--task {name} does not say what to measure: write {meant}:{name}, or put {others} before it"
    )


def _local(kind: str, path: Path, exclude_self: bool) -> Any:
    if not path.exists():
        raise UserError(f"--task {kind}:{path}: there is no such file or folder")
    if kind == "sts" and path.is_dir():
        raise UserError(f"--task sts:{path} is a folder: sts needs a file")
    make: dict[str, Any] = {
        "sts": _sts,
        "retrieval": partial(_retrieval, exclude_self=exclude_self),
        "clustering": _clustering,
        "classification": _classification,
    }
    return make[kind](path)


def _metadata(path: Path, task_type: str, main_score: str, files: Sequence[Path], split: str) -> TaskMetadata:
    """Returns metadata without a prompt. A local task has an instruction only if the user's file names it."""
    return TaskMetadata(
        name=f"{task_type}-{path.stem}",
        description=f"{task_type} on local data.",
        dataset={"path": str(path), "revision": _revision(path, files)},
        type=task_type,
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def _revision(path: Path, files: Sequence[Path]) -> str:
    """Returns a key of the files' content, and of their names in a folder, which are labels."""
    content = files_sha256(files)
    return json_sha256([content, [file.name for file in files]]) if path.is_dir() else content


def _made(base: type, metadata: TaskMetadata, dataset: Any, **settings: Any) -> Any:
    """Returns an instance of mteb's class that already holds its data, so it does not ask the hub."""

    def load_data(self: Any, *args: Any, **options: Any) -> None:
        self.dataset, self.data_loaded = dataset, True

    namespace = {"metadata": metadata, "load_data": load_data, **settings}
    return type(metadata.name, (base,), namespace)()


def _sts(path: Path) -> Any:
    pairs = load_graded_pairs(path)
    columns = {"sentence1": pairs.first, "sentence2": pairs.second, "score": pairs.scores}
    metadata = _metadata(path, "STS", "cosine_spearman", [path], "test")
    lowest, highest = min(pairs.scores), max(pairs.scores)
    data = DatasetDict(test=Dataset.from_dict(columns))
    return _made(AbsTaskSTS, metadata, data, min_score=lowest, max_score=highest)


def _clustering(path: Path) -> Any:
    rows = _labelled(path)
    data = Dataset.from_dict(
        {"sentences": [row["text"] for row in rows], "labels": [row["label"] for row in rows]}
    )
    metadata = _metadata(path, "Clustering", "v_measure", _files_of(path), "test")
    # All documents of a small local set count. By default, mteb samples 4 %.
    return _made(AbsTaskClustering, metadata, DatasetDict(test=data), max_fraction_of_documents_to_embed=None)


def _classification(path: Path) -> Any:
    """Makes a classification task. With a column `split` (train, test) it works as mteb's tasks.

    Without that column it uses cross-validation over all rows.
    """
    rows = _labelled(path)
    names = sorted({row["label"] for row in rows})

    def part(chosen: list[dict[str, str]]) -> Dataset:
        labels = [names.index(row["label"]) for row in chosen]
        return Dataset.from_dict({"text": [row["text"] for row in chosen], "label": labels})

    if not any("split" in row for row in rows):
        if len(rows) < LEAST_ROWS:
            raise UserError(f"{path}: without a column `split`, a task needs at least {LEAST_ROWS} rows")
        metadata = _metadata(path, "Classification", "accuracy", _files_of(path), "train")
        return _made(AbsTaskClassification, metadata, DatasetDict(train=part(rows)), is_cross_validation=True)
    parts = {name: [row for row in rows if row.get("split") == name] for name in ("train", "test")}
    if empty := [name for name, chosen in parts.items() if not chosen]:
        raise UserError(f"{path}: no row has {empty[0]!r} in its column `split`")
    labels = {name: {row["label"] for row in chosen} for name, chosen in parts.items()}
    if unknown := sorted(labels["test"] - labels["train"]):
        raise UserError(
            f"{path}: only test rows have the label {unknown[0]!r}, so no classifier can learn it: add train "
            "rows with it, or remove these test rows"
        )
    if len(labels["train"]) < 2:
        raise UserError(f"{path}: its train rows need at least two different labels")
    metadata = _metadata(path, "Classification", "accuracy", _files_of(path), "test")
    data = DatasetDict({name: part(chosen) for name, chosen in parts.items()})
    return _made(AbsTaskClassification, metadata, data)


def _labelled(path: Path) -> list[dict[str, str]]:
    """Returns rows with `text` and `label` from a file or a folder.

    A file has any format but .txt. In a folder, the file names are the labels. Each file gives its first
    `TEXTS_OF_A_FILE` different texts, from the column `text`, or `query` for training pairs.
    """
    if path.is_dir():
        files = _files_of(path)
        rows = [row for file in files for row in islice(_texts_of(file), TEXTS_OF_A_FILE)]
        if len({row["label"] for row in rows}) < 2:
            raise UserError(f"{path}: a task needs at least two files, whose names are the labels")
        return rows
    rows = []
    for row, place in rows_of(path, ["text", "label"], BadRows(), ["split"]):
        if not all(_is_given(row.get(name)) for name in ("text", "label")):
            raise UserError(f"{place}: expected the columns text and label, and a value in both")
        rows.append({name: str(value) for name, value in row.items() if value is not None})
    if len({row["label"] for row in rows}) < 2:
        raise UserError(f"{path}: a task needs at least two different labels")
    return rows


def _files_of(path: Path) -> Sequence[Path]:
    return find_source(str(path), "--task").files if path.is_dir() else [path]


def _texts_of(file: Path) -> Iterator[dict[str, str]]:
    """Yields each text once, with the file's name (without endings) as its label."""
    label, seen = _without_endings(file), set()
    for row, place in rows_of(file, ["text"], BadRows(), ["query"]):
        text = row.get("text") or row.get("query")
        if not isinstance(text, str) or not is_text(text):
            raise UserError(f"{place}: expected a text in the column text, or query")
        if text not in seen:
            seen.add(text)
            yield {"text": text, "label": label}


def _without_endings(file: Path) -> str:
    """Returns a file's name without the endings of its compression and format."""
    name = file.name
    for endings in (COMPRESSIONS, FORMATS):
        name = next((name.removesuffix(end) for end in endings if name.lower().endswith(end)), name)
    return name


def _is_given(value: Any) -> bool:
    """Returns whether a text or label is there. A label may be a number, true or false."""
    return isinstance(value, int) or (isinstance(value, str) and bool(value.strip()) and is_text(value))


def _retrieval(path: Path, exclude_self: bool) -> Any:
    """Makes a retrieval task. `ignore_identical_ids` of mteb leaves out documents with the query's own id."""
    data = read_beir(path) if path.is_dir() else corpus_of_pairs(path)
    titles, texts = zip(*data.corpus.values(), strict=True)
    split = {
        "corpus": Dataset.from_dict({"id": list(data.corpus), "title": titles, "text": texts}),
        "queries": Dataset.from_dict({"id": list(data.queries), "text": list(data.queries.values())}),
        "relevant_docs": data.relevant,
        "top_ranked": None,
    }
    files = [path / name for name in FILES] if path.is_dir() else [path]
    metadata = _metadata(path, "Retrieval", "ndcg_at_10", files, "test")
    if exclude_self:  # this gives another score, so results without it must not be used
        metadata.dataset["revision"] += "-exclude-self"
    return _made(AbsTaskRetrieval, metadata, {"default": {"test": split}}, ignore_identical_ids=exclude_self)
