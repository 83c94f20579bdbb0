"""Tokenises a source once into memory-mapped Arrow files that every rank and every later run reads.

The name of a folder of prepared texts is a key of the source (paths, sizes, times of change), the tokenizer
and the settings. The folder is filled part by part under another name. A note says how far the parts go, so a
killed preparation continues where it stopped. At the end the folder is renamed, so it is complete or absent.

Before a folder is used again, its content is compared with its fingerprint. A damaged folder is made again.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.data.prepared_folder import (
    FORMAT_VERSION,
    MANIFEST,
    NEGATIVE,
    QUERY,
    Manifest,
    batches,
    check_bad_rows,
    damage_of,
    fingerprint,
    largest_id,
    n_duplicates,
    prepared_root,
    read_manifest,
)
from llm2vec_ds.data.prompts import (
    CHAT,
    Prompt,
    Template,
    TokenizedText,
    check_tokenizer,
    split,
    template_for,
    tokenize,
)
from llm2vec_ds.data.sources import Source, find_source, stream_pairs, stream_texts
from llm2vec_ds.errors import UserError, reason
from llm2vec_ds.process.progress import Progress
from llm2vec_ds.recipe.sections import DataConfig
from llm2vec_ds.storage.durable import put_folder, replace_json
from llm2vec_ds.storage.fingerprint import key_of
from llm2vec_ds.storage.lock import held
from llm2vec_ds.storage.reading import read_json

log = logging.getLogger(__name__)

LOST_SHARE = 0.01
"""If a larger share of texts is in another encoding, the log warns."""
TEXTS_PER_BLOCK = 500
CHARACTERS_PER_BLOCK = 2**20
TEXTS_PER_PART = 200_000
CHARACTERS_PER_PART = 2**26

Item = tuple[str, ...]
"""One text, or the texts of one example: query, positive, negatives."""


@dataclass(frozen=True)
class PreparedTexts:
    """Tokenised texts on disk.

    Attributes:
        fingerprint: SHA-256 of their content.
    """

    rows: Any
    fingerprint: str
    lengths: np.ndarray
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> list[TokenizedText]:
        block = self.rows[[int(i) for i in indices]]
        columns = (block[name] for name in ("input_ids", "pool_start", "pool_end", "text_hash"))
        return [TokenizedText(*values) for values in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Instructions:
    """The instructions before queries and before documents. Texts without pairs use the one for queries."""

    query: str | None = None
    document: str | None = None


def prepare(
    data: DataConfig,
    path: str | list[str],
    tokenizer: Any,
    *,
    end_with_eos: bool = False,
    instructions: Instructions | None = None,
) -> Path:
    """Returns the folder of prepared texts. Makes it first if it is missing or damaged.

    One process does this while the others wait. The caller makes the other ranks wait, and a lock file makes
    other runs wait.

    Args:
        instructions: for queries and documents of pairs. None: `data.instruction`, for texts and queries.

    Raises:
        UserError: the source cannot be read, or holds no text.
    """
    check_tokenizer(tokenizer)
    source = find_source(path)
    template = template_for(data.template, tokenizer)
    instructions = instructions or Instructions(data.instruction)
    root = prepared_root(data)
    folder = root / _key(data, source, tokenizer, end_with_eos, instructions)
    if folder.is_dir() and not damage_of(folder):
        check_bad_rows(folder, str(source), data.bad_rows)
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with held(root / f".{folder.name}.lock", f"prepared texts in {root}", wait=True):
            if folder.is_dir() and (damage := damage_of(folder)):
                log.warning("prepared texts in %s are damaged (%s): preparing them again", folder, damage)
                shutil.rmtree(folder)
            if not folder.is_dir():
                to_rows = _ToRows(data, tokenizer, template, end_with_eos, instructions)
                _Preparation(data, source, to_rows, folder).run()
    except OSError as error:
        raise UserError(f"prepared texts in {root} cannot be written: {reason(error)}") from None
    return folder


def load_prepared(folder: Path) -> PreparedTexts:
    """Opens a folder that `prepare` made. Only the lengths are read into memory.

    Raises:
        UserError: it is damaged, and this shows without reading all of it.
    """
    import pyarrow as pa

    manifest = read_manifest(folder)
    try:
        rows = _memory_mapped(folder, manifest.parts)
        lengths = rows.data.column("n_tokens").to_numpy()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(f"prepared texts in {folder} are damaged ({cause}): prepare them again") from None
    return PreparedTexts(rows, manifest.fingerprint, lengths, manifest.counts)


@dataclass
class _Progress:
    """How far the finished parts go.

    Attributes:
        counts: rows, tokens, and what was left out and why.
    """

    n_texts_read: int = 0
    parts: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _ToRows:
    """Turns the items of a source into tokenised rows with their roles."""

    data: DataConfig
    tokenizer: Any
    template: Template
    end_with_eos: bool
    instructions: Instructions

    def __call__(self, block: list[Item], counts: Counter[str]) -> Iterator[tuple[int, TokenizedText]]:
        roles = [min(place, NEGATIVE) for item in block for place in range(len(item))]
        prompts = [
            Prompt(self.instructions.query if role == QUERY else self.instructions.document, text)
            for role, text in zip(roles, chain.from_iterable(block), strict=True)
        ]
        texts = tokenize(self.tokenizer, prompts, self.template, end_with_eos=self.end_with_eos)
        pairs = iter(zip(roles, texts, strict=True))
        for item in block:
            own = list(islice(pairs, len(item)))
            if any(text.pool_start == text.pool_end for _, text in own):
                counts["blank"] += 1
                continue
            for role, text in own:
                for row in self._cut(text, counts):
                    counts["rows"] += 1
                    counts["tokens"] += len(row)
                    yield role, row

    def _cut(self, text: TokenizedText, counts: Counter[str]) -> Iterator[TokenizedText]:
        counts["shortened"] += len(text) > self.data.max_tokens
        parts = split(text, self.data.max_tokens)
        return parts if self.data.long_texts == "split" else islice(parts, 1)


class _Preparation:
    """Makes one folder of prepared texts."""

    def __init__(self, data: DataConfig, source: Source, to_rows: _ToRows, folder: Path) -> None:
        self.data = data
        self.source = source
        self.to_rows = to_rows
        self.folder = folder
        self.unfinished = folder.with_name(f".{folder.name}.unfinished")
        self.note = self.unfinished / "progress.json"

    def run(self) -> None:
        self.unfinished.mkdir(exist_ok=True)
        progress = self._progress()
        left_out: Counter[str] = Counter()
        texts = self._stream(left_out)
        with Progress("tokenise", "text") as bar:
            # Texts of finished parts are read again but not tokenised. This counts again what is left out.
            bar.update(sum(1 for _ in islice(texts, progress.n_texts_read)))
            for text in texts:
                n_read = self._write_part(chain([text], texts), progress, bar)
                progress.n_texts_read += n_read
                progress.counts |= left_out
                self._write_note(progress)
        progress.counts |= left_out
        self._finish(progress)

    def _progress(self) -> _Progress:
        """Returns how far an earlier preparation came. Reads its parts, because they may be cut off.

        A power cut can do that.
        """
        import pyarrow as pa

        if not self.note.exists():
            return _Progress()
        try:
            progress = read_json(self.note, _Progress, "its parts are not used")
            if (
                sum(len(batch) for batch in batches(self.unfinished, progress.parts))
                != progress.counts["rows"]
            ):
                raise ValueError("rows are missing")
        except (UserError, OSError, KeyError, ValueError, pa.ArrowException) as error:
            log.warning("%s is damaged (%s): preparing from the first text again", self.unfinished, error)
            return _Progress()
        log.info("preparing %s: continuing after %s texts", self.source, progress.n_texts_read)
        return progress

    def _stream(self, left_out: Counter[str]) -> Iterator[Item]:
        data = self.data
        if data.pairs is not None:
            pairs = stream_pairs(self.source, data.pairs, left_out, bad_rows=data.bad_rows)
            return islice(pairs, data.max_texts)
        whole = data.long_texts == "split"
        texts = stream_texts(self.source, data.text_column, left_out, whole=whole, bad_rows=data.bad_rows)
        return ((text,) for text in islice(texts, data.max_texts))

    def _write_part(self, texts: Iterator[Item], progress: _Progress, bar: Any) -> int:
        """Tokenises the next texts into one Arrow file. Returns how many texts it read."""
        import pyarrow as pa

        name = f"part-{len(progress.parts):05d}.arrow"
        counts = Counter(progress.counts)
        n_read = n_characters = 0
        schema = pa.schema([pa.field(column, kind) for column, kind in _columns().items()])
        with pa.OSFile(str(self.unfinished / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while n_read < TEXTS_PER_PART and n_characters < CHARACTERS_PER_PART:
                block = _block(texts)
                if not block:
                    break
                rows = list(self.to_rows(block, counts))
                if rows:
                    writer.write_batch(pa.RecordBatch.from_pydict(_as_columns(rows), schema))
                n_read += len(block)
                n_characters += sum(map(_n_characters, block))
                bar.update(len(block))
        progress.parts.append(name)
        progress.counts = dict(counts)
        return n_read

    def _write_note(self, progress: _Progress) -> None:
        """Writes the note that says how far the finished parts go."""
        replace_json(self.note, asdict(progress), None)

    def _finish(self, progress: _Progress) -> None:
        counts = progress.counts
        left_out = {name: n for name, n in counts.items() if n and name not in ("rows", "tokens")}
        if not counts.get("rows"):
            reasons = ", ".join(f"{n} {name}" for name, n in left_out.items()) or "it is empty"
            raise UserError(f"{self.source}: no text in it ({reasons})")
        n_twice = n_duplicates(self.unfinished, progress.parts, counts["rows"])
        counts["duplicates"] = left_out["duplicates"] = n_twice
        if (n_lost := counts.get("not UTF-8", 0)) > LOST_SHARE * (n_lost + counts["rows"]):
            log.warning(
                "%s: %s texts are not UTF-8 and are left out. Convert the file, such as by "
                "iconv -f latin1 -t utf8 FILE > NEW",
                *(self.source, n_lost),
            )
        manifest = Manifest(
            fingerprint=fingerprint(self.unfinished, progress.parts),
            source=str(self.source),
            largest_id=largest_id(self.unfinished, progress.parts),
            parts=progress.parts,
            counts=counts,
        )
        replace_json(self.unfinished / MANIFEST, asdict(manifest))
        self.note.unlink(missing_ok=True)
        put_folder(self.unfinished, self.folder)
        log.info(
            "prepared %s: %s %s, %s tokens; %s",
            self.source,
            counts["rows"],
            "rows" if self.data.pairs is None else "texts of pairs",
            counts["tokens"],
            ", ".join(f"{n} {name}" for name, n in left_out.items() if n) or "nothing left out",
        )


def _columns() -> dict[str, Any]:
    import pyarrow as pa

    small = pa.int32()
    return {
        "input_ids": pa.list_(small),
        "pool_start": small,
        "pool_end": small,
        "text_hash": pa.int64(),
        "n_tokens": small,
        "role": pa.int8(),
    }


def _as_columns(rows: list[tuple[int, TokenizedText]]) -> dict[str, list[Any]]:
    return {
        "input_ids": [list(row.input_ids) for _, row in rows],
        "pool_start": [row.pool_start for _, row in rows],
        "pool_end": [row.pool_end for _, row in rows],
        "text_hash": [row.text_hash for _, row in rows],
        "n_tokens": [len(row) for _, row in rows],
        "role": [role for role, _ in rows],
    }


def _block(items: Iterator[Item]) -> list[Item]:
    """Returns the next items, few enough for the tokenizer's memory."""
    block: list[Item] = []
    n_characters = 0
    for item in items:
        block.append(item)
        n_characters += _n_characters(item)
        if len(block) == TEXTS_PER_BLOCK or n_characters >= CHARACTERS_PER_BLOCK:
            break
    return block


def _n_characters(item: Item) -> int:
    return sum(map(len, item))


def _memory_mapped(folder: Path, parts: list[str]) -> Any:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(folder / name)) for name in parts])


def _key(
    data: DataConfig, source: Source, tokenizer: Any, end_with_eos: bool, instructions: Instructions
) -> str:
    settings = data.model_dump(
        exclude={
            "path": True,
            "held_out_path": True,
            "prepared_dir": True,
            "instruction": True,
            "bad_rows": True,
            "max_texts": data.max_texts is None,  # so folders from before this key existed keep their names
            "pairs": {"instructions", "positives", "sampling_temperature"},
        }
    )
    chat = getattr(tokenizer, "chat_template", None) if data.template == CHAT else None
    backend = tokenizer.backend_tokenizer.to_str()
    parts = [source.identity(), settings, end_with_eos, astuple(instructions), chat, backend]
    return key_of(*parts, version=FORMAT_VERSION)
