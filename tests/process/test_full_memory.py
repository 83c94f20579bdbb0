"""A full memory, of a GPU or of the machine: one line that says what to lower, in every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2vec_ds.engine.run import train
from llm2vec_ds.process.full_memory import GPU, MACHINE, full_memory
from llm2vec_ds.recipe.recipe import parse_recipe
from tests.support.in_process import assert_reads, error_line, run
from tests.support.runs import recipe, write_recipe

PETABYTE = 2**50


def torch_on_the_host(*_: Any, **__: Any) -> None:
    torch.empty(PETABYTE, dtype=torch.uint8)


def numpy_on_the_host(*_: Any, **__: Any) -> None:
    np.empty(PETABYTE, dtype=np.uint8)


def on_a_gpu(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


WHICH = {torch_on_the_host: MACHINE, numpy_on_the_host: MACHINE, on_a_gpu: GPU}


@pytest.fixture(params=WHICH, ids=lambda fills: fills.__name__)
def fills(request: pytest.FixtureRequest) -> Callable[..., None]:
    found: Callable[..., None] = request.param
    return found


@pytest.mark.parametrize(
    ("error", "which"),
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), GPU),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), GPU),
        (MemoryError(), MACHINE),
        (OSError(12, "Cannot allocate memory"), MACHINE),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError(28, "No space left on device"), None),
        (ValueError("out of memory is no shape"), None),
    ],
    ids=str,
)
def test_told_apart(error: Exception, which: str | None) -> None:
    assert full_memory(error) == which


def test_in_training(
    fills: Callable[..., None],
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llm2vec_ds.engine.trainer.Trainer._step", fills)
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    assert_reads(
        error_line(capsys),
        f"{WHICH[fills]} is full; planned … GiB (…). Try batch.micro_batch_tokens=80 (now 160), …",
    )


COMMANDS = {
    "encode": "encode --model MODEL --input TMP/texts.txt --output TMP/v.npy --micro-batch-tokens 99",
    "mine": "mine --model MODEL --pairs TMP/p.jsonl --output TMP/m.jsonl --micro-batch-tokens 99",
    "words": "evaluate words --model MODEL --train TMP/w.txt --test TMP/w.txt --column 1 --output TMP/words "
    "--micro-batch-tokens 99",
    "export": "export MODEL --output TMP/out",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_in_other_commands(
    name: str,
    fills: Callable[..., None],
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts.txt").write_text("rain\n")
    (tmp_path / "p.jsonl").write_text('{"query": "fish", "positive": "trout"}\n')
    (tmp_path / "w.txt").write_text("rain N\nfalls V\n\n")
    monkeypatch.setattr("llm2vec_ds.encoder.encoder.trunk_hidden_states", fills)
    words = COMMANDS[name].replace("MODEL", str(tiny_model_dir)).replace("TMP", str(tmp_path))
    assert run(monkeypatch, *words.split()) == 2
    fix = "end other programs, or use a machine with more memory"
    if "--micro-batch-tokens" in words:
        fix = "lower --micro-batch-tokens (now 99)"
    assert error_line(capsys) == f"{WHICH[fills]} is full: {fix}"


def test_train_takes_its_evaluation_by_name(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", max_steps=1)
    values["evaluation"] = {"tasks": []}
    measured: list[float] = []

    def evaluation(encoder: Any) -> dict[str, float]:
        measured.append(float(encoder.dimensions))
        return {"width": measured[-1]}

    train(parse_recipe(values), evaluation=evaluation)
    assert measured == [32, 32]  # at the start and at the end
