"""What a user of `train` gets wrong in the recipe or on the machine; `plan` reads the same recipe."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.in_process import assert_reads, error_line, full_disk, run
from tests.support.mistakes import FREE_SOME, PAIRS, Mistake
from tests.support.runs import recipe, write_recipe

DEEPSPEED = {"deepspeed": "TMP/ds.json"}

MISTAKES = {
    # The recipe.
    "no recipe": Mistake(
        "recipe TMP/none.yaml cannot be read (No such file or directory): give the path of a YAML file. "
        "`llm2vec-ds init` writes recipes/",
        ("train", "TMP/none.yaml"),
    ),
    "not YAML": Mistake(
        "recipe TMP/a.yaml is not valid YAML: …", ("train", "TMP/a.yaml"), files={"a.yaml": b"stage: [mntp"}
    ),
    "a list": Mistake(
        "recipe TMP/a.yaml must be a YAML mapping of keys to values",
        ("train", "TMP/a.yaml"),
        files={"a.yaml": b"- mntp\n"},
    ),
    "unknown key": Mistake(
        "TMP/r.yaml: unknown key `simcse.attention_dropuot`: did you mean `simcse.attention_dropout`?",
        changes={"simcse": {"attention_dropuot": 0.1}},
    ),
    "a key like no other": Mistake(
        "TMP/r.yaml: unknown key `optimizer.learnrate`: docs/recipe_keys.md lists all keys",
        changes={"optimizer": {"learnrate": 1e-4}},
    ),
    "brackets of YAML": Mistake(
        "TMP/r.yaml: `mntp.mask_token`: must be a valid string. Square brackets make a list in YAML: put the "
        "value in quotes (got ['MASK'])",
        ("train", "RECIPE", "mntp.mask_token=[MASK]"),
        stage="mntp",
    ),
    "a key as an option": Mistake(
        "there is no option --model.path: write recipe keys as key=value, e.g. optimizer.lr=1e-4",
        ("train", "RECIPE", "--model.path=x"),
    ),
    "wrong type": Mistake(
        "TMP/r.yaml: `batch.global_batch_size`: must be a valid integer (got 'many')",
        ("train", "RECIPE", "batch.global_batch_size=many"),
    ),
    "two mistakes, one line": Mistake(
        "TMP/r.yaml: `data.path` is missing; unknown key `sed`: did you mean `seed`?",
        changes={"data": {}, "sed": 1},
    ),
    "unknown stage": Mistake(
        "TMP/r.yaml: `stage` must be one of … (got 'mlm')", ("train", "RECIPE", "stage=mlm")
    ),
    "section of another stage": Mistake(
        "TMP/r.yaml: section `mntp` has no effect in stage `simcse`: remove it", changes={"mntp": {}}
    ),
    "not key=value": Mistake(
        "override 'seed' is not key=value, e.g. optimizer.lr=1e-4", ("train", "RECIPE", "seed")
    ),
    "an infinite learning rate": Mistake(
        "TMP/r.yaml: `optimizer.lr`: must be a finite number (got inf)",
        ("train", "RECIPE", "optimizer.lr=.inf"),
    ),
    "a pair of floats, one no number": Mistake(
        "TMP/r.yaml: `optimizer.betas.1`: must be a finite number (got nan)",
        ("train", "RECIPE", "optimizer.betas=[0.9, .nan]"),
    ),
    "a machine without end": Mistake(
        "TMP/r.yaml: `machine.memory_gib`: must be a finite number (got 'inf')",
        ("plan", "RECIPE", "--gpu-memory-gib", "inf"),
    ),
    "a batch of one text": Mistake(
        "TMP/r.yaml: batch.global_batch_size=1 leaves the simcse loss without negatives, so it is always 0: "
        "raise the batch size",
        ("train", "RECIPE", "batch.global_batch_size=1"),
    ),
    "no other query in a batch of one": Mistake(
        "TMP/r.yaml: simcse.between_queries does nothing with batch.global_batch_size=1: raise the batch "
        "size, or leave it out",
        ("train", "RECIPE", "batch.global_batch_size=1", "simcse.between_queries=true"),
    ),
    "a batch of one pair, its negatives not read": Mistake(
        "TMP/r.yaml: batch.global_batch_size=1 leaves the supervised loss without negatives, so it is always "
        "0: raise the batch size",
        ("train", "TMP/r.yaml", "stage=supervised", "simcse=null", "batch.global_batch_size=1"),
        {"data": {"path": "TMP/p.jsonl", "pairs": {"max_negatives": 0}}},
        PAIRS,
    ),
    "a batch of one pair without negative": Mistake(
        "batch.global_batch_size=1: 1 of 2 examples have no hard negative, so their loss is always 0: raise "
        "batch.global_batch_size, or give each example a negative",
        ("train", "TMP/r.yaml", "stage=supervised", "simcse=null", "batch.global_batch_size=1"),
        {"data": {"path": "TMP/p.jsonl", "max_tokens": 64}},
        {
            "p.jsonl": b'{"query": "a", "positive": "b", "negative": "c"}\n'
            b'{"query": "d", "positive": "e", "negative": []}\n'
        },
    ),
    "a stage without keys": Mistake(
        "recipe TMP/s.yaml: stage `mntp` has keys of its own: write them below it",
        ("train", "TMP/s.yaml"),
        files={"s.yaml": b"stages: {mntp: foo}\n"},
    ),
    "a list of folders": Mistake(
        "TMP/s.yaml, stage mntp: `output_dir`: must be a valid string…",
        ("train", "TMP/s.yaml"),
        files={"s.yaml": b"output_dir: [a]\nmodel: {path: m}\ndata: {path: d.txt}\nstages: {mntp: null}\n"},
    ),
    # Its batch and its engine.
    "batch larger than data": Mistake(
        "64 texts do not fill one batch of 1000: lower batch.global_batch_size, or give more data",
        changes={"batch": {"global_batch_size": 1000}},
    ),
    "token budget": Mistake(
        "batch.micro_batch_tokens=60 cannot hold a text of data.max_tokens=64: raise it to at least 64",
        changes={"batch": {"global_batch_size": 8, "micro_batch_tokens": 60}},
    ),
    "no DeepSpeed JSON": Mistake(
        "DeepSpeed config TMP/ds.json not found: see ds_configs/ for ready ones", changes=DEEPSPEED
    ),
    "broken DeepSpeed JSON": Mistake(
        "DeepSpeed config TMP/ds.json must be a JSON object: …", changes=DEEPSPEED, files={"ds.json": b"{"}
    ),
    "auto in DeepSpeed JSON": Mistake(
        'DeepSpeed config TMP/ds.json: `zero_optimization.stage` is "auto": give a value, or leave the key '
        "out",
        changes=DEEPSPEED,
        files={"ds.json": b'{"zero_optimization": {"stage": "auto"}}'},
    ),
    "unknown ZeRO stage": Mistake(
        "DeepSpeed config TMP/ds.json: `zero_optimization.stage` is 9: write 0, 1, 2 or 3",
        changes=DEEPSPEED,
        files={"ds.json": b'{"zero_optimization": {"stage": 9}}'},
    ),
    "unknown ZeRO key": Mistake(
        "DeepSpeed refuses a section (DeepSpeedZeroConfig) of the JSON that `deepspeed` names: `stagee`: …",
        changes=DEEPSPEED,
        files={"ds.json": b'{"zero_optimization": {"stagee": 2}}'},
    ),
    "some rank variables": Mistake(
        "RANK set without LOCAL_RANK, WORLD_SIZE: set all three or none", variables={"RANK": "0"}
    ),
    "rank beyond the world": Mistake(
        "rank 2 is not below the world size 2",
        variables={"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    "ranks that know no address": Mistake(
        "several ranks need MASTER_ADDR and MASTER_PORT: set the node and port of rank 0",
        variables={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    # Where it goes.
    "a run is there": Mistake(
        "TMP/run already holds a run: continue it with resume=true, choose another output_dir, or pass "
        "overwrite=true",
        files={"run/metrics.jsonl": b"precious\n", "run/recipe.yaml": b"precious"},
    ),
    "files of others are there": Mistake(
        "output_dir TMP/run holds metrics.jsonl, which no run wrote: choose another output_dir, or move it "
        "away",
        files={"run/metrics.jsonl": b"precious\n"},
    ),
    "a run told to stay stopped": Mistake(
        "TMP/run/STOP is there to keep this run from starting: remove it first",
        files={"run/STOP": b""},
    ),
    "a best checkpoint without a measure": Mistake(
        "TMP/r.yaml: checkpoint.best_by=loss needs held-out texts or an evaluation: set data.held_out_path "
        "or evaluation.tasks",
        changes={"checkpoint": {"best_by": "loss"}},
    ),
    "output_dir is a file": Mistake(
        "output_dir TMP/run is a file: choose another",
        files={"run": b"precious\n"},
    ),
    "output_dir below a file": Mistake(
        "output_dir TMP/texts.txt/run cannot be written: Not a directory: choose a path that you can "
        "write to",
        changes={"output_dir": "TMP/texts.txt/run"},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name: str, costs_one_line: Callable[[Mistake], None]) -> None:
    costs_one_line(MISTAKES[name])


def test_fewer_held_out_texts_than_ranks(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "two.txt").write_text("one\nother\n")
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    values["data"]["held_out_path"] = str(tmp_path / "two.txt")
    monkeypatch.setattr("llm2vec_ds.engine.build.world_size", lambda: 3)
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    said = "data.held_out_path has 2 texts or pairs for 3 ranks: give at least one for each rank"
    assert error_line(capsys) == said


def test_a_monitor_without_its_package(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else found(name))
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", monitor=["wandb"])
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    assert_reads(
        error_line(capsys), "monitor wandb needs the package wandb: pip install 'llm2vec-ds[monitor]'"
    )


def test_a_port_that_is_taken(tmp_path: Path, tiny_model_dir: Path, texts_file: Path) -> None:
    """In a process of its own: the tests' own may have met its one rank already."""
    values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "llm2vec_ds", "train", write_recipe(values, tmp_path / "r.yaml")],
            env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **place},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert_reads(
        done.stderr.splitlines()[-1],
        f"llm2vec-ds: error: rank 0 of 2 cannot connect to the others at 127.0.0.1:{place['MASTER_PORT']} (…"
        "address already in use): start every rank with this MASTER_ADDR, and with a MASTER_PORT that is "
        "free on rank 0's node and open to the other nodes",
    )


@pytest.mark.parametrize(
    ("bytes_a_file", "max_steps", "what"),
    [(1600, 10, "metrics.jsonl"), (30_000, 2, "encoder")],
    ids=["metrics", "encoder"],
)
def test_a_full_disk_in_an_otherwise_fine_run(
    bytes_a_file: int,
    max_steps: int,
    what: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run", overwrite=True, max_steps=max_steps)
    path = write_recipe(values, tmp_path / "r.yaml")
    assert run(monkeypatch, "prepare", path) == 0
    encoder = tmp_path / "run" / "encoder"
    encoder.mkdir(parents=True)
    (encoder / "model.safetensors").write_bytes(b"precious")
    manifest = {"format_version": 1, "llm2vec_ds_version": "0.1.0", "files": ["model.safetensors"]}
    (encoder / "llm2vec_ds_files.json").write_text(json.dumps(manifest))
    for name in ("recipe.yaml", "metrics.jsonl"):  # a run's folder
        (tmp_path / "run" / name).touch()
    capsys.readouterr()
    with full_disk(bytes_a_file):
        assert run(monkeypatch, "train", path) == 2
    name = f"encoder {tmp_path / 'run' / what}" if what == "encoder" else str(tmp_path / "run" / what)
    assert_reads(error_line(capsys), f"{name} {FREE_SOME}")
    assert (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes() == b"precious"
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {"encoder", "metrics.jsonl", "recipe.yaml", "run.json"}


def test_a_full_gpu(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr("llm2vec_ds.engine.trainer.Trainer._step", full)
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    assert_reads(
        error_line(capsys),
        "the GPU's memory is full; planned … GiB (weights …). Try batch.micro_batch_tokens=80 "
        "(now 160), or model.activation_checkpointing=full, or model.quantization=nf4, or … (CUDA out of "
        "memory. Tried …)",
    )
