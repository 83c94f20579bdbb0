"""A run's encoder → a folder with an ONNX graph, for onnxruntime, transformers.js and sentence-transformers.

    run, demo or encoder folder ─► plan (or a refusal) ─► folder of a stock trunk ─► traced, weights go
        ─► asked through onnxruntime ─► OUTPUT

OUTPUT appears only when onnxruntime makes the encoder's vectors of it.
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
    check_output,
    find_encoder,
    load_for_export,
    say,
    write_folder,
)
from llm2vec_ds.export.onnx.file import NAMES, write_file
from llm2vec_ds.export.onnx.rules import checked_batches, plan_onnx
from llm2vec_ds.storage.output_folder import replaced_folder

log = logging.getLogger(__name__)

CHILD = "llm2vec_ds.export.onnx.onnxruntime_child"
LOWEST_COSINE = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.8}
"""What rounding may cost a vector; in int8 inputs of products are rounded too."""


def export_onnx(source: Path, output: Path, options: ExportOptions) -> list[str]:
    """Writes `output` and returns what one has to know beside the graph, each as a sentence.

    Raises:
        UserError: nothing to export there, an encoder that the graph cannot express or torch cannot trace, an
            output that exists or cannot be written, or one that does not give the encoder's vectors.
    """
    dtype = "fp32" if options.dtype == "auto" else options.dtype
    if dtype not in NAMES:
        raise UserError(f"--dtype {dtype!r} is not in --format onnx: choose auto, {', '.join(NAMES)}")
    folder, what = find_encoder(source), f"--output {output}"
    check_output(output, what, [source, folder], options.overwrite)
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
        encoder.trunk = None  # its memory is needed for the fresh copy
        gc.collect()
        file = write_file(unfinished, planned.pooled, dtype, length)
        copied = copy_licence_files(found.base, unfinished)
        vectors = ask(file, [[template.render(None, text)[0] for text in batch] for batch in batches], length)
        compare("onnxruntime", None, vectors, expected, LOWEST_COSINE[dtype])
    log.info("%s: onnx, %s, %s", output, dtype, file.relative_to(unfinished))
    say(licence_name, found, copied, planned.notes)
    return planned.notes


def ask(file: Path, batches: list[list[str]], max_tokens: int) -> np.ndarray:
    """onnxruntime's vectors of texts, batch by batch, `[N, D]` fp32; asked in a separate process.

    Raises:
        UserError: onnxruntime does not take the file, or ended.
    """
    return np.array(ask_reader("onnxruntime", CHILD, file, max_tokens, batches), dtype=np.float32)
