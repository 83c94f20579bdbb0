"""Writes the vectors of a file of texts into one file, or into shards of a folder.

    texts ─► work folder: vectors.npy grows block by block, a note says how far ─► .npy, .jsonl or .parquet

A killed run continues where it stopped. Texts and vectors need not fit in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from llm2vec_ds import __version__
from llm2vec_ds.data.sources import Source, find_source
from llm2vec_ds.data.text_rows import TextRows, count_rows
from llm2vec_ds.encoder.bad_texts import BadText, BadTexts
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.fingerprint import encoder_fingerprint
from llm2vec_ds.encoder.passes import CPU_TOKENS, lower_pass
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.process.full_memory import enough_memory
from llm2vec_ds.storage.durable import move_file, replace_json
from llm2vec_ds.storage.fingerprint import files_in, json_sha256, key_of
from llm2vec_ds.storage.growing_files import create_array, fill_rows
from llm2vec_ds.storage.output_folder import check_new_file, check_reads_no_output
from llm2vec_ds.storage.reading import read_json
from llm2vec_ds.storage.work_folder import work_folder
from llm2vec_ds.vectors.files import (
    VECTOR_FORMATS,
    Shard,
    VectorNote,
    note_of,
    vector_blocks,
    write_rows,
)
from llm2vec_ds.vectors.quantized import DTYPES, STORED, Stored, quantize, stored_width

log = logging.getLogger(__name__)

STDIN = "-"
FORMAT_VERSION = 2
"""Version of the file format, and of the way texts become vectors."""


@dataclass(frozen=True)
class EncodeOptions:
    """What to encode, and how. All options but `micro_batch_tokens` change the vectors."""

    model: str
    input: str
    text_column: str = "text"
    instruction: str | None = None
    prompt_name: str | None = None
    normalize: bool = False
    truncate_dim: int | None = None
    attention: str = "auto"
    precision: str = "auto"
    bad_texts: BadTexts = "raise"
    micro_batch_tokens: int | None = None
    stored: Stored = "float32"

    @property
    def bad_rows(self) -> str:
        """What to do with a row that breaks its format. It is treated as a bad text."""
        return "skip" if self.bad_texts == "nan" else "raise"

    def key(self, source: Source) -> str:
        """Returns a key of all that the vectors depend on. A model counts by size and time of its files."""
        values = asdict(self)
        del values["micro_batch_tokens"]
        if self.stored == "float32":  # keys from before this option existed stay the same
            del values["stored"]
        files, on_cuda = files_in(Path(self.model)), torch.cuda.is_available()
        return key_of(values, source.identity(), files, on_cuda, version=FORMAT_VERSION)

    def key_of_version_1(self, source: Source, toolkit: str) -> str:
        """Returns the key that version `toolkit` would use. Its keys had no format version."""
        values = asdict(self)
        values["batch_tokens"] = values.pop("micro_batch_tokens") or CPU_TOKENS  # the old name and default
        del values["stored"]
        parts = [toolkit, values, source.identity(), files_in(Path(self.model)), torch.cuda.is_available()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Target:
    """Where the vectors go: a file, or a shard in a folder, in one of VECTOR_FORMATS."""

    path: Path
    shard: Shard = field(default_factory=Shard)
    suffix: str = ".npy"

    @classmethod
    def of(cls, output: Path, shard: str | None, suffix: str) -> Target:
        """Reads the target from the command line. A file's name gives its format, `suffix` that of a folder.

        Raises:
            UserError: the format is unknown, or there is a shard but `output` is a file.
        """
        if suffix not in VECTOR_FORMATS:
            known = ", ".join(f[1:] for f in VECTOR_FORMATS)
            raise UserError(f"--format {suffix[1:]!r} is unknown: choose one of {known}")
        if str(output) == STDIN:
            raise UserError("--output - is no file: vectors cannot go to standard output")
        parsed = Shard.parse(shard) if shard is not None else Shard()
        if output.suffix in VECTOR_FORMATS and not output.is_dir():
            if shard is not None:
                raise UserError(
                    f"--shard needs a folder, but --output {output} is a file: leave out {output.suffix}"
                )
            return cls(output, suffix=output.suffix)
        if output.suffix and not output.is_dir() and shard is None:
            raise UserError(f"--output {output} must end in {', '.join(VECTOR_FORMATS)}, or name a folder")
        return cls(parsed.file(output, suffix), parsed, suffix)


def encode_file(options: EncodeOptions, target: Target, *, overwrite: bool = False) -> Path:
    """Writes the target's vectors and their note. A finished target with the same options stays as it is.

    Raises:
        UserError: an option or the input is wrong, or the output belongs to other options or cannot be
            written.
    """
    _check_stored(options, target)
    file = target.path
    folder = file.with_name(f".{file.name}.encoding")
    with writing(f"--output {file}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if options.input == STDIN:
            return _encode_stdin(options, target, folder, overwrite)
        source = find_source(options.input, "--input")
        check_reads_no_output([file, note_of(file)], source.files, f"--output {file}")
        _check_note(file)
        key = _key(options, source, target)
        if file.exists() and not overwrite:
            note = VectorNote.read(file)
            if note is not None and note.key == key:
                log.info("%s: already done, nothing to do", file)
                return file
            if note is not None and (others := _differences(note, options, source)):
                raise UserError(
                    f"--output {file} exists, made with another {', '.join(others)}: choose another, or give "
                    "--overwrite"
                )
        check_new_file(file, f"--output {file}", overwrite)
        with work_folder(folder, f"{key} {target.shard}"):
            _run(_Encoding(options, source, target, folder, key))
    return file


def _check_stored(options: EncodeOptions, target: Target) -> None:
    if options.stored not in STORED:
        raise UserError(f"--store {options.stored!r} is unknown: choose {', '.join(STORED)}")
    if options.stored != "float32" and target.suffix != ".npy":
        raise UserError(f"--store {options.stored} is for .npy files, not for {target.suffix}: use .npy")
    if options.stored == "binary" and options.bad_texts == "nan":
        raise UserError("--store binary cannot mark a text without vector: use int8, or --bad-texts raise")


def _key(options: EncodeOptions, source: Source, target: Target) -> str:
    """Returns today's key, or that of version 1 if these shards began with it. All shards need one key."""
    shard, folder = target.shard, target.path.parent
    parts = [Shard(index, shard.count).file(folder, target.suffix) for index in range(shard.count)]
    files = [file for file in (parts if target.path in parts else [target.path]) if file.exists()]
    note = next((note for note in map(VectorNote.read, files) if note is not None), None)
    if note is not None and note.key == options.key_of_version_1(source, note.llm2vec_ds_version):
        return note.key
    return options.key(source)


def _encode_stdin(options: EncodeOptions, target: Target, folder: Path, overwrite: bool) -> Path:
    """Encodes standard input. It cannot be read twice, so it goes to the disk first and cannot be resumed."""
    if target.shard.count > 1:
        raise UserError("--shard needs a file as --input: standard input is read once")
    check_new_file(target.path, f"--output {target.path}", overwrite)
    _check_note(target.path)
    check_reads_no_output([target.path], [Path("/dev/stdin")], f"--output {target.path}")
    with work_folder(folder, f"stdin {os.getpid()}"):
        spooled = folder / "stdin.txt"
        with spooled.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        _run(_Encoding(options, Source((spooled,)), target, folder, key=f"stdin {os.getpid()}"))
    return target.path


def _differences(note: VectorNote, options: EncodeOptions, source: Source) -> list[str]:
    """Names what an earlier encoding, which has this note, was made of and this one is not."""
    model, texts = (_absolute(options.model), _absolute(options.input))
    both = {
        "model": (note.model, model),
        "input": (note.input, texts),
        "text column": (note.text_column, options.text_column),
        "instruction": (note.instruction, options.instruction),
        "normalize": (note.normalize, options.normalize),
        "store": (note.stored, options.stored),
    }
    found = [name for name, (before, now) in both.items() if before != now]
    if note.model == model and note.model_key not in (None, encoder_fingerprint(options.model)):
        found.append("state of the model")
    if note.input == texts and note.input_key not in (None, json_sha256(source.identity())):
        found.append("state of the input")
    return found


def _check_note(file: Path) -> None:
    """Checks a note without vectors. A killed process left it, or it is a file of others."""
    if file.exists() or not note_of(file).exists():
        return
    try:
        VectorNote.read(file)
    except UserError:
        raise UserError(
            f"--output {file}: its note would overwrite {note_of(file)}, which is another file: choose "
            "another --output"
        ) from None


def _run(encoding: _Encoding) -> None:
    """Runs an encoding. If it fails, the work folder stays if another run can continue from it."""
    try:
        encoding.run()
    except BaseException:
        if not encoding.progress.exists() or encoding.options.input == STDIN:
            shutil.rmtree(encoding.folder)
        raise
    shutil.rmtree(encoding.folder)


class _Encoding:
    """Works in one work folder. It does only what is missing."""

    def __init__(
        self, options: EncodeOptions, source: Source, target: Target, folder: Path, key: str
    ) -> None:
        self.options, self.source, self.target, self.key = options, source, target, key
        self.folder = folder
        self.input_key = json_sha256(source.identity())
        self.model_key = encoder_fingerprint(options.model)
        self.vectors = folder / "vectors.npy"
        self.rows = folder / f"rows{target.suffix}"
        self.progress = folder / "progress.json"

    def _rows(self, start: int, stop: int) -> TextRows:
        return TextRows(self.source, self.options.text_column, start, stop, bad_rows=self.options.bad_rows)

    def run(self) -> None:
        options = self.options
        n_rows = count_rows(self.source, options.text_column, bad_rows=options.bad_rows)
        if not n_rows:
            raise UserError(f"--input {options.input} is empty: give a file with at least one text")
        start, stop = self.target.shard.rows(n_rows)
        encoder = Encoder.from_pretrained(
            options.model, attention=options.attention, precision=options.precision
        )
        dimensions = options.truncate_dim or encoder.dimensions
        try:
            with enough_memory(lower_pass(options.micro_batch_tokens)):
                self._encode(encoder, start, stop, dimensions)
        except BadText as bad:
            raise UserError(self._named(bad)) from None
        if self.target.suffix != ".npy":
            write_rows(self.rows, self._blocks(start, stop), dimensions)
        self._finish(start, stop, n_rows, dimensions)

    def _named(self, bad: BadText) -> str:
        """Says where a bad text stands, and what to do."""
        place, source = self._rows(bad.row, bad.row + 1).place(), str(self.source)
        if self.options.input == STDIN:  # it is read from a copy in the work folder
            place, source = place and place.replace(source, "standard input"), "standard input"
        if place is None:
            return (
                f"{source}, row {bad.row + 1} is no text in UTF-8: convert the file, such as by iconv "
                "-f latin1 -t utf8 FILE > NEW, or give --bad-texts nan"
            )
        return f"{place}: the text {bad.what}: correct or remove it, or give --bad-texts nan"

    def _encode(self, encoder: Encoder, start: int, stop: int, dimensions: int) -> None:
        stored = self.options.stored
        width = stored_width(dimensions, stored)
        n_done, shape = self._n_done(), (stop - start, width)
        if not n_done or not self.vectors.exists():  # it was moved to the output, which must be made again
            n_done = 0
            create_array(self.vectors, shape, DTYPES[stored])
        if self._stored_shape() != (shape, np.dtype(DTYPES[stored])) or not 0 <= n_done <= stop - start:
            raise UserError(f"{self.vectors} is damaged: remove {self.folder} to start again")
        rows = self._rows(start + n_done, stop)
        for block in encoder.encode_blocks(
            rows,
            instruction=self.options.instruction,
            prompt_name=self.options.prompt_name,
            normalize=self.options.normalize,
            truncate_dim=self.options.truncate_dim,
            micro_batch_tokens=self.options.micro_batch_tokens,
            bad_texts=self.options.bad_texts,
            first_row=start + n_done,
            show_progress=True,
        ):
            fill_rows(self.vectors, stop - start, n_done, quantize(block, stored))
            n_done += len(block)
            replace_json(self.progress, n_done)
        if n_done != stop - start:
            raise UserError(f"--input {self.options.input} became shorter while it was read: start again")

    def _stored_shape(self) -> tuple[tuple[int, ...], np.dtype] | None:
        """Returns shape and dtype of the stored vectors. None: the file is damaged."""
        try:
            mapped = np.load(self.vectors, mmap_mode="r")
        except (OSError, EOFError, ValueError):
            return None
        return mapped.shape, mapped.dtype

    def _n_done(self) -> int:
        if not self.progress.exists():
            return 0
        return read_json(self.progress, int, f"remove {self.folder} to start again")

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, list[str | None], np.ndarray]]:
        """Yields first row, texts and vectors of each block."""
        texts = iter(self._rows(start, stop))
        for vectors in vector_blocks(self.vectors):
            yield start, list(islice(texts, len(vectors))), vectors
            start += len(vectors)

    def _finish(self, start: int, stop: int, n_rows: int, dimensions: int) -> None:
        options, file = self.options, self.target.path
        note = VectorNote(
            key=self.key,
            model=_absolute(options.model),
            input=_absolute(options.input),
            text_column=options.text_column,
            instruction=options.instruction,
            normalize=options.normalize,
            first_row=start,
            n_rows=n_rows,
            n_rows_here=stop - start,
            dimensions=dimensions,
            llm2vec_ds_version=__version__,
            stored=options.stored,
            input_key=self.input_key,
            model_key=self.model_key,
        )
        # An old note goes first, so that it never describes the new file.
        note_of(file).unlink(missing_ok=True)
        move_file(self.vectors if self.target.suffix == ".npy" else self.rows, file)
        note.write(file)
        log.info("%s: %s vectors of %s dimensions", file, stop - start, dimensions)


def _absolute(place: str) -> str:
    """Returns the absolute path of a file or folder. A hub id and standard input stay as they are."""
    return str(Path(place).resolve()) if Path(place).exists() else place
