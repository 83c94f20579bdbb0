"""Examples (query, positive, hard negatives) from several sources of pairs, numbered from 0."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.data.batches import GlobalBatches, QueryBatches, SourceBatches
from llm2vec_ds.data.prepare import Instructions, PreparedTexts, load_prepared, prepare
from llm2vec_ds.data.prepared_folder import QUERY
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.data.row_files import COMPRESSIONS
from llm2vec_ds.data.sources import find_source
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.recipe import Recipe
from llm2vec_ds.recipe.sections import DataConfig
from llm2vec_ds.storage.reading import read_yaml_mapping

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceEntry:
    """What the file of instructions says about a source.

    Attributes:
        group: sources of one group share batches.
        in_batch_negatives: whether its queries are also compared with the texts of other examples.
    """

    group: str
    instructions: Instructions
    in_batch_negatives: bool = True


@dataclass(frozen=True)
class PairSource:
    """One file (or hub data set) of pairs."""

    name: str
    path: str
    given: SourceEntry

    @property
    def instructions(self) -> Instructions:
        return self.given.instructions


def find_pair_sources(data: DataConfig, path: str | list[str]) -> list[PairSource]:
    """Returns the sources that `path` names, ordered by group and name. `PreparedPairs` uses the same order.

    Raises:
        UserError: a file is missing, or the instructions are no mapping or lack a source.
    """
    found = find_source(path)
    places = {found.hub: found.hub} if found.hub else {_name(file): str(file) for file in found.files}
    if not found.hub and len(places) < len(found.files):
        raise UserError(
            f"data.path {path!r}: two files have the same name, but each source needs its own: rename one"
        )
    pairs = data.pairs
    if pairs is None or pairs.instructions is None:
        own = Instructions(data.instruction)
        return [PairSource(name, place, SourceEntry(name, own)) for name, place in sorted(places.items())]
    given = _read_instructions(Path(pairs.instructions))
    if missing := sorted(set(places) - set(given)):
        raise UserError(
            f"{pairs.instructions} has no entry for {', '.join(missing[:5])}: add a line `{missing[0]}: …` "
            "(null for no instruction)"
        )
    found_sources = [PairSource(name, places[name], given[name]) for name in places]
    return sorted(found_sources, key=lambda source: (source.given.group, source.name))


class PreparedPairs:
    """Examples of several sources. Numbers run through all groups, and within a group through its sources."""

    def __init__(self, groups: dict[str, list[PreparedTexts]]) -> None:
        self._texts = [texts for group in groups.values() for texts in group]
        self._starts = [np.flatnonzero(_roles(texts) == QUERY) for texts in self._texts]
        self._first_example = np.cumsum([0, *(len(starts) for starts in self._starts)])
        counts = iter(len(starts) for starts in self._starts)
        self.group_sizes = {name: sum(next(counts) for _ in group) for name, group in groups.items()}
        # Groups decide which examples share a batch. Sources that each are their own group keep the form that
        # version 0.1 gave them. Otherwise `_` ends each group.
        of_groups = ["-".join(texts.fingerprint[:16] for texts in group) for group in groups.values()]
        grouped = len(groups) < len(self._texts)
        self.fingerprint = "".join(f"{own}_" for own in of_groups) if grouped else "-".join(of_groups)

    def __len__(self) -> int:
        return int(self._first_example[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(texts.longest for texts in self._texts)

    @property
    def n_without_negatives(self) -> list[int]:
        """Number of examples without hard negatives, by source."""
        sizes = (
            np.diff(starts, append=len(texts))
            for starts, texts in zip(self._starts, self._texts, strict=True)
        )
        return [int(np.count_nonzero(size <= 2)) for size in sizes]

    @property
    def source_sizes(self) -> list[int]:
        """Number of examples, by source."""
        return [len(starts) for starts in self._starts]

    def sources_of(self, examples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the number of each example's source."""
        found: np.ndarray = np.searchsorted(self._first_example, examples, side="right") - 1
        return found

    def batches(self, recipe: Recipe) -> GlobalBatches:
        """Returns which examples go to which step, as the recipe says.

        Raises:
            UserError: there are fewer examples than one batch needs.
        """
        assert recipe.data.pairs is not None
        size, temperature = recipe.batch.global_batch_size, recipe.data.pairs.sampling_temperature
        if recipe.data.pairs.positives == "all":
            return SourceBatches(tuple(self.group_sizes.values()), size, recipe.seed, temperature)
        return QueryBatches(self._queries_of_groups(), size, recipe.seed, temperature)

    def _queries_of_groups(self) -> list[np.ndarray]:
        """Returns for each group the query number of each example. Equal texts and instructions share one."""
        hashes = np.concatenate(
            [
                texts.rows.data.column("text_hash").to_numpy()[starts]
                for texts, starts in zip(self._texts, self._starts, strict=True)
            ]
        )
        ends = np.cumsum(list(self.group_sizes.values()))[:-1]
        return [np.unique(own, return_inverse=True)[1] for own in np.split(hashes, ends)]

    def text_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the hashes of all queries, and of all documents."""
        hashes = [texts.rows.data.column("text_hash").to_numpy() for texts in self._texts]
        is_query = [_roles(texts) == QUERY for texts in self._texts]
        queries, documents = (
            np.concatenate([found[own == wanted] for found, own in zip(hashes, is_query, strict=True)])
            for wanted in (True, False)
        )
        return queries, documents

    def __getitem__(self, examples: Sequence[int] | np.ndarray) -> list[list[TokenizedText]]:
        """Returns the texts of each example: query, positive, hard negatives. Reads each source once."""
        examples = np.asarray(examples, dtype=np.int64)
        sources = self.sources_of(examples)
        found: dict[int, list[TokenizedText]] = {}
        for source in np.unique(sources).tolist():
            own = np.flatnonzero(sources == source)
            found |= zip(own.tolist(), self._read(source, examples[own]), strict=True)
        return [found[place] for place in range(len(examples))]

    def _read(self, source: int, examples: np.ndarray) -> Iterator[list[TokenizedText]]:
        starts, texts = self._starts[source], self._texts[source]
        places = examples - self._first_example[source]
        sizes = np.append(starts, len(texts))[places + 1] - starts[places]
        rows = np.concatenate(
            [np.arange(starts[p], starts[p] + n) for p, n in zip(places, sizes, strict=True)]
        )
        read = iter(texts[rows])
        return (list(islice(read, int(size))) for size in sizes)


def prepare_pairs(
    data: DataConfig, path: str | list[str], tokenizer: Any, *, end_with_eos: bool = False
) -> dict[str, list[Path]]:
    """Prepares the texts of all sources. Returns their folders by group."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for source in find_pair_sources(data, path):
        groups[source.given.group].append(
            prepare(data, source.path, tokenizer, end_with_eos=end_with_eos, instructions=source.instructions)
        )
    return dict(groups)


def load_prepared_pairs(groups: dict[str, list[Path]]) -> PreparedPairs:
    """Opens the folders that `prepare_pairs` made."""
    loaded = {name: [load_prepared(folder) for folder in folders] for name, folders in groups.items()}
    return PreparedPairs(loaded)


def prepare_all(recipe: Recipe, tokenizer: Any) -> list[dict[str, list[Path]]]:
    """Prepares the training data, and held-out data if the recipe names some. Returns folders by group."""
    data, end_with_eos = recipe.data, recipe.pooling == "eos"
    made = []
    if data.held_out_path is not None:
        held_out = find_source(data.held_out_path, "data.held_out_path")
        both = set(find_source(data.path).files) & set(held_out.files)
        if both:
            names = ", ".join(map(str, sorted(both)))
            log.warning("data.held_out_path names files that also train: %s", names)
    for path in (data.path, data.held_out_path):
        if path is None:
            continue
        if data.pairs is not None:
            made.append(prepare_pairs(data, path, tokenizer, end_with_eos=end_with_eos))
        else:
            made.append({"texts": [prepare(data, path, tokenizer, end_with_eos=end_with_eos)]})
    return made


def _roles(texts: PreparedTexts) -> np.ndarray:
    roles: np.ndarray = texts.rows.data.column("role").to_numpy()
    return roles


def _name(file: Path) -> str:
    compressed = file.suffix.lower() in COMPRESSIONS
    return Path(file.stem).stem if compressed else file.stem


def _read_instructions(path: Path) -> dict[str, SourceEntry]:
    """Reads the file of instructions. Returns its entries by source."""
    what, remedy = f"data.pairs.instructions {path}", "give a YAML file of instructions by source"
    values = read_yaml_mapping(path, what, "sources to instructions", remedy)
    return {name: _given(path, name, value) for name, value in values.items()}


def _given(path: Path, name: str, value: Any) -> SourceEntry:
    if value is None or isinstance(value, str):
        return SourceEntry(name, Instructions(value))
    known = {"query", "document", "group", "in_batch_negatives"}
    if not isinstance(value, dict) or not set(value) <= known:
        raise UserError(
            f"{path}: `{name}` must be an instruction, or a mapping with the keys query, document, group, "
            "in_batch_negatives"
        )
    in_batch = value.get("in_batch_negatives", True)
    if not isinstance(in_batch, bool):
        raise UserError(f"{path}: `{name}.in_batch_negatives` must be true or false")
    texts = {key: text for key, text in value.items() if key != "in_batch_negatives"}
    if wrong := [key for key, text in texts.items() if not isinstance(text, str | None)]:
        raise UserError(f"{path}: `{name}.{wrong[0]}` must be a text")
    instructions = Instructions(texts.get("query"), texts.get("document"))
    return SourceEntry(texts.get("group") or name, instructions, in_batch)
