"""Exports a run's encoder as an ONNX graph, for onnxruntime, transformers.js and sentence-transformers.

    run, demo or encoder folder ─► plan (or an error) ─► folder of a stock trunk ─► graph instead of weights
        ─► checked with onnxruntime ─► OUTPUT

OUTPUT appears only after onnxruntime gives the encoder's vectors.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import numpy as np
import torch

from llm2vec_ds.data.prompts import Template
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.export.card import copy_licence_files, licence, origin, write_card
from llm2vec_ds.export.checked import ask_reader, compare
from llm2vec_ds.export.export import (
    ExportOptions,
    find_encoder,
    load_for_export,
    say,
    write_folder,
)
from llm2vec_ds.export.onnx.file import NAMES, write_file
from llm2vec_ds.export.onnx.rules import checked_batches, plan_onnx
from llm2vec_ds.storage.output_folder import check_new_folder, replaced_folder

log = logging.getLogger(__name__)

CHILD = "llm2vec_ds.export.onnx.onnxruntime_child"
LOWEST_COSINE = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.8}
"""Lowest cosine that rounding may cause. With int8, the inputs of products are rounded, too."""


def export_onnx(source: Path, output: Path, options: ExportOptions) -> list[str]:
    """Writes `output` and returns notes for users of the graph, each a sentence.

    Raises:
        UserError: there is nothing to export; a graph cannot express the encoder, or torch cannot trace it;
            the output exists or cannot be written; or it does not give the encoder's vectors.
    """
    dtype = "fp32" if options.dtype == "auto" else options.dtype
    if dtype not in NAMES:
        raise UserError(
            f"--dtype {dtype!r} is not supported by --format onnx: choose auto, {', '.join(NAMES)}"
        )
    folder, what = find_encoder(source), f"--output {output}"
    check_new_folder(output, what, [source, folder], options.overwrite)
    encoder = load_for_export(folder, options)
    settings = encoder.settings
    template, length = Template(settings.template, settings.special_tokens), settings.max_tokens
    planned = plan_onnx(encoder)
    batches = checked_batches(encoder)
    expected = encoder.encode([text for batch in batches for text in batch])
    found = origin(source)
    licence_name = licence(found.base, options.licence)
    with writing(what), replaced_folder(output, what, [source, folder]) as unfinished:
        write_folder(unfinished, encoder, planned.as_modules, torch.float32)
        graph = f"onnx/{NAMES[dtype]}"
        write_card(unfinished, encoder, found, licence_name, planned.notes, graph, options.card)
        encoder.trunk = None  # frees its memory for the exported copy
        gc.collect()
        log.info("writing the graph: this takes a minute or more")
        file = write_file(unfinished, planned.pooled, dtype, length)
        copied = copy_licence_files(found.base, unfinished)
        log.info("checking the graph by onnxruntime")
        vectors = ask(file, [[template.render(None, text)[0] for text in batch] for batch in batches], length)
        compare("onnxruntime", None, vectors, expected, LOWEST_COSINE[dtype])
    log.info("%s: onnx, %s, %s", output, dtype, file.relative_to(unfinished))
    say(licence_name, found, copied, planned.notes)
    return planned.notes


def ask(file: Path, batches: list[list[str]], max_tokens: int) -> np.ndarray:
    """Returns onnxruntime's vectors of all texts, `[N, D]` fp32. It runs batch by batch in another process.

    Raises:
        UserError: onnxruntime cannot read the file, or failed.
    """
    return np.array(ask_reader("onnxruntime", CHILD, file, max_tokens, batches), dtype=np.float32)
