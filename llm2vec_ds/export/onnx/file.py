"""Traces a stock trunk to `onnx/NAME.onnx` with torch.onnx. onnxruntime quantizes it to int8."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from llm2vec_ds.errors import UserError
from llm2vec_ds.export.onnx.graph import INPUTS, OUTPUTS, Graph, Pooled

NAMES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
"""File names that transformers.js looks for."""
DTYPES_OF_TRANSFORMERS_JS = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}
LARGEST_FILE = 1_900_000_000
"""Most bytes of weights in one file. protobuf's limit is 2 GiB."""


def write_file(folder: Path, pooled: Pooled, dtype: str, max_tokens: int) -> Path:
    """Replaces the weights in `folder` by the trunk's graph, and returns the graph's file.

    Raises:
        UserError: torch.onnx cannot trace the trunk.
    """
    from transformers import AutoModel

    trunk = AutoModel.from_pretrained(
        folder,
        dtype=torch.float16 if dtype == "fp16" else torch.float32,
        attn_implementation="eager",
        trust_remote_code=False,
    ).eval()
    file = folder / "onnx" / NAMES[dtype]
    file.parent.mkdir()
    model = traced(Graph(trunk, pooled), trunk.config.model_type)
    is_apart = _save(model, file) if dtype != "int8" else _save_int8(model, file)
    del model, trunk
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    found: dict[str, Any] = {"dtype": DTYPES_OF_TRANSFORMERS_JS[dtype]}
    if is_apart:
        found["use_external_data_format"] = {file.name: True}
    _put(folder / "config.json", {"transformers.js_config": found})
    # Pipelines of transformers.js cut texts at this length.
    _put(folder / "tokenizer_config.json", {"model_max_length": max_tokens})
    return file


def traced(graph: Graph, kind: str) -> onnx_ir.Model:
    """Returns the graph for any number of texts of any length. `kind` is the model type, for messages.

    Raises:
        UserError: torch.onnx cannot trace it.
    """
    ids = torch.ones(2, 7, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    either = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                (ids, mask),
                input_names=INPUTS,
                output_names=OUTPUTS,
                dynamic_shapes=(either, either),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UserError(
            f"--format onnx: torch.onnx cannot trace model type {kind!r} ({reason[:200]}): "
            "use --format sentence-transformers"
        ) from None
    assert program is not None
    model: onnx_ir.Model = program.model
    _name_axes(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # holds source lines, with paths of this machine
    return model


def _name_axes(model: onnx_ir.Model) -> None:
    """Names the dynamic axes `batch` and `length`, instead of torch's own names."""
    graph = model.graph
    first = graph.inputs[0].shape
    assert first is not None
    names = {str(first[0]): "batch", str(first[1]): "length"}
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                [names.get(str(n), n if isinstance(n, int) else str(n)) for n in value.shape]
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides torch's warnings and logs. Nothing is lost: an error is also raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _save(model: onnx_ir.Model, file: Path) -> bool:
    """Saves the graph, and returns whether its weights are in a separate file beside it."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    is_apart = sum(weight.nbytes for weight in weights if weight is not None) > LARGEST_FILE
    onnx_ir.save(model, file, external_data=f"{file.name}_data" if is_apart else None)
    return is_apart


def _save_int8(model: onnx_ir.Model, file: Path) -> bool:
    """Saves the graph with matrices in int8, one scale a column. Their inputs are rounded at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole, rounded = file.with_name("whole.onnx"), file.with_name("rounded.onnx")
    is_apart = _save(model, whole)
    with _quiet():
        quantize_dynamic(
            whole, rounded, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=is_apart
        )
    is_apart = _save(onnx_ir.load(rounded), file)
    for left in (*file.parent.glob("whole.onnx*"), *file.parent.glob("rounded.onnx*")):
        left.unlink()
    return is_apart


def _put(file: Path, values: dict[str, Any]) -> None:
    """Sets values in a JSON file."""
    said = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
