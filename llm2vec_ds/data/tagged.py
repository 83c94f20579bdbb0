"""Reads sentences with a label for each word: CoNLL-U or CoNLL column files, or a hub data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_ds.data.row_files import COMPRESSIONS, opened_text
from llm2vec_ds.errors import UserError

CONLLU_COLUMNS = {"form": 1, "lemma": 2, "upos": 3, "xpos": 4, "deprel": 7}
HUB = "hub:"


@dataclass(frozen=True)
class TaggedSentence:
    """The words of a sentence, and one label for each."""

    words: list[str]
    labels: list[str]


def load_tagged(source: str, column: str) -> list[TaggedSentence]:
    """Reads sentences and the labels of one column.

    Args:
        source: a .conllu file, a CoNLL column file, or `hub:owner/name@split`. A column file has one word per
            line, columns separated by spaces, and an empty line after each sentence.
        column: for .conllu `upos`, `xpos`, `deprel` or a number. For a column file a number from 0; negative
            numbers count from the end (-1: the last). For a hub data set a name, such as `ner_tags`.

    Raises:
        UserError: the source cannot be read, has no such column, or holds no sentence.
    """
    if source.startswith(HUB):
        sentences = _from_hub(source, column)
    else:
        path = Path(source)
        number = _column_number(column, path)
        with opened_text(path) as lines:
            blocks = list(_blocks(lines, source, conllu=_is_conllu(path)))
        word = CONLLU_COLUMNS["form"] if _is_conllu(path) else 0
        sentences = [_sentence(block, word, number, source) for block in blocks]
    if not sentences:
        raise UserError(f"{source} holds no sentence: give a file with one word a line")
    return sentences


def _is_conllu(path: Path) -> bool:
    endings = [ending.lower() for ending in path.suffixes]
    return [ending for ending in endings if ending not in COMPRESSIONS][-1:] == [".conllu"]


def _column_number(column: str, path: Path) -> int:
    if _is_conllu(path) and column in CONLLU_COLUMNS:
        return CONLLU_COLUMNS[column]
    try:
        return int(column)
    except ValueError:
        known = ", ".join(CONLLU_COLUMNS) if _is_conllu(path) else "a number such as -1 (the last)"
        raise UserError(f"{path} has no column {column!r}: choose {known}") from None


Line = tuple[int, list[str]]


def _blocks(lines: Any, source: str, *, conllu: bool) -> Iterator[list[Line]]:
    """Yields sentences as numbered lines of columns. Skips multi-word tokens and empty nodes of CoNLL-U."""
    block: list[Line] = []
    for number, line in enumerate(lines, 1):
        columns = line.rstrip("\n").split("\t") if conllu else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            if block:
                yield block
            block = []
        elif conllu and (line.startswith("#") or not columns[0].isdigit()):
            if not line.startswith("#") and not set("-.") & set(columns[0]):
                raise UserError(
                    f"{source}, line {number} is no line of CoNLL-U (ten columns separated by tabs): correct "
                    "it, or give the file another ending than .conllu"
                )
        else:
            block.append((number, columns))
    if block:
        yield block


def _sentence(block: list[Line], word: int, label: int, source: str) -> TaggedSentence:
    for number, columns in block:
        if not -len(columns) <= label < len(columns):
            raise UserError(f"{source}, line {number}: no column {label}, it has {len(columns)}")
    return TaggedSentence([c[word] for _, c in block], [c[label] for _, c in block])


def _from_hub(source: str, column: str) -> list[TaggedSentence]:
    """Reads the hub's own Parquet conversion. Many such sets are scripts, which `datasets` no longer runs."""
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB).partition("@")
    if not split:
        raise UserError(f"{source}: name the split, such as {source}@test")
    try:
        data = load_dataset(name, revision="refs/convert/parquet", split=split)
    except Exception as error:  # `load_dataset` raises many types, and all mean that there is no data
        raise UserError(f"{source} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    if column not in data.column_names or "tokens" not in data.column_names:
        raise UserError(
            f"{source} needs the columns tokens and {column}: it has {', '.join(data.column_names)}"
        )
    label = getattr(data.features[column], "feature", None)
    if label is None:
        raise UserError(f"{source}: the column {column} holds no lists of labels: choose another")
    names = getattr(label, "names", None)
    return [
        TaggedSentence(
            row["tokens"], [names[i] for i in row[column]] if names else list(map(str, row[column]))
        )
        for row in data
    ]
