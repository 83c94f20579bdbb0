"""Exports a run's encoder as one GGUF file, for llama.cpp, Ollama and LM Studio.

    run, demo or encoder folder ─► plan (or an error) ─► .NAME.new ─► checked with llama.cpp ─► NAME

If `xllamacpp` is installed, the file appears only after llama.cpp gives the encoder's tokens and vectors.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from llm2vec_ds.data.prompts import Prompt, Template, tokenize
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.export.card import copy_licence_files, licence, origin, write_card
from llm2vec_ds.export.checked import checked_texts, compare
from llm2vec_ds.export.export import ExportOptions, find_encoder, load_for_export, stored_dtype
from llm2vec_ds.export.gguf.file import plan, write
from llm2vec_ds.export.gguf.llama_cpp import ask, is_installed
from llm2vec_ds.export.gguf.tensors import STORAGES
from llm2vec_ds.storage.durable import move_file, unfinished_file
from llm2vec_ds.storage.lock import held
from llm2vec_ds.storage.output_folder import check_new_file, resolved

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
NAMES_OF_TORCH = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
OTHER_NAMES = {"fp32": "f32", "fp16": "f16"}
LOWEST_COSINE = {"f32": 0.9999, "f16": 0.99, "bf16": 0.9, "q8_0": 0.8}
"""Lowest cosine that rounding may cause. llama.cpp rounds weights and also the inputs of products. Rounding
changes the vectors of an untrained LLM most. A wrong file changes vectors far more."""
TOKENS_OF_ALL_KINDS = [
    "It's 9 o'clock; they'll pay $1,234.50 for 12345678 items (we've said so)!",
    "two  blanks,\ttabs,\n\nempty lines  \r\n and   an end ",
    "CamelCase snake_case HTTPServer x=y+1; // ...!!!",
    "Straße, naïve café, Ελληνικά, русский, עברית, العربية, 中文字符, 日本語, 한국어",
    "👍🏽 family 👨‍👩‍👧 ½ ² ™ \u00a0 zero\u200bwidth",
]
"""Texts on which pre-tokenizers differ: digits, apostrophes, spaces, scripts, case, symbols."""


def export_gguf(
    source: Path, output: Path, options: ExportOptions, card_folder: Path | None = None
) -> list[str]:
    """Writes `output` and returns notes for users of llama.cpp, each a sentence.

    Args:
        card_folder: gets a model card and the base model's licence files.

    Raises:
        UserError: there is nothing to export; llama.cpp cannot express the encoder; the output exists or
            cannot be written; or the file does not give the encoder's vectors.
    """
    what = f"--output {output}"
    place = _place(output, what, options)
    folder = find_encoder(source)
    name = _storage_name(folder, options.dtype)
    encoder = load_for_export(folder, options)
    planned = plan(encoder, STORAGES[name])
    found = origin(source)
    about = {"name": place.stem, "type": "model"}
    if said := licence(found.base, options.licence):
        about["license"] = said
    unfinished = unfinished_file(place)
    with writing(what):
        place.parent.mkdir(parents=True, exist_ok=True)
        with held(unfinished.with_name(f"{unfinished.name}.lock"), what):
            try:
                write(unfinished, encoder, planned, about)
                _verify(unfinished, encoder, LOWEST_COSINE[name])
                move_file(unfinished, place)
            finally:
                unfinished.unlink(missing_ok=True)
    if card_folder is not None:
        write_card(card_folder, encoder, found, said, planned.notes, place.name, options.card)
        copy_licence_files(found.base, card_folder)
    log.info("%s: gguf, %s, for texts of up to %s tokens", output, name, planned.longest)
    if said is None:
        log.warning("licence: none found for %s: look it up and give it with --licence", found.base_name)
    else:
        log.info("licence: %s", said)
    for note in planned.notes:
        log.warning("limit: %s", note)
    return planned.notes


def _place(output: Path, what: str, options: ExportOptions) -> Path:
    place = resolved(output, what)
    if place.suffix != ".gguf":
        raise UserError(f"{what}: a GGUF is one file: name it {place.name}.gguf")
    check_new_file(place, what, options.overwrite)
    if place.exists():
        with place.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{what} exists and is not a GGUF file: choose another")
    return place


def _storage_name(folder: Path, dtype: str) -> str:
    if dtype == "auto":
        return NAMES_OF_TORCH[stored_dtype(folder)]
    name = OTHER_NAMES.get(dtype, dtype)
    if name not in STORAGES:
        raise UserError(f"--dtype {dtype!r} is unknown: choose auto, {', '.join(STORAGES)}")
    return name


def _verify(file: Path, encoder: Encoder, lowest: float) -> None:
    """Loads the file with llama.cpp, and compares tokens and vectors with the encoder's."""
    if not is_installed():
        log.warning("not checked with llama.cpp, which is not installed: pip install 'llm2vec-ds[gguf]'")
        return
    settings = encoder.settings
    template = Template(settings.template, settings.special_tokens)
    texts = [*checked_texts(), *TOKENS_OF_ALL_KINDS]
    sent = [template.render(None, text)[0] for text in texts]
    prompts = [Prompt(None, text) for text in texts]
    tokenized = tokenize(encoder.tokenizer, prompts, template, end_with_eos=settings.pooling == "eos")
    fitting = [i for i, text in enumerate(tokenized) if len(text) <= settings.max_tokens]
    answer = ask(file, [sent[i] for i in fitting], settings.max_tokens)
    for i, ids in zip(fitting, answer.ids, strict=True):
        if ids != list(tokenized[i].input_ids):
            raise UserError(
                f"llama.cpp gives other tokens than the encoder for {texts[i]!r}: nothing was exported. "
                "Use --format sentence-transformers"
            )
    compare("llama.cpp", None, answer.vectors, encoder.encode([texts[i] for i in fitting]), lowest)
