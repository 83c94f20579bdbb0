"""What a user gets wrong, and the one line that it costs: cause and mend, no traceback, nothing half-done."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.support.in_process import assert_reads, error_line, full_disk, run
from tests.support.runs import recipe, write_recipe
from tests.support.tiny import sentences, tiny_tokenizer

Files = dict[str, bytes]


@dataclass(frozen=True)
class Mistake:
    """`line` is what is printed after `llm2vec-ds: error: `; `…` stands for words of another library."""

    line: str
    arguments: tuple[str, ...] = ("train", "RECIPE")
    changes: dict[str, Any] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    stage: str = "simcse"
    variables: dict[str, str] = field(default_factory=dict)


def data(name: str, **more: Any) -> dict[str, Any]:
    return {"data": {"path": f"TMP/{name}", "max_tokens": 64} | more}


def encode(*more: str, input: str = "texts.txt", output: str = "v.npy") -> tuple[str, ...]:
    return ("encode", "--model", "MODEL", "--input", f"TMP/{input}", "--output", f"TMP/{output}", *more)


def mine(*more: str, pairs: str = "p.jsonl", output: str = "m.jsonl") -> tuple[str, ...]:
    return ("mine", "--model", "MODEL", "--pairs", f"TMP/{pairs}", "--output", f"TMP/{output}", *more)


def quantised_config(method: str) -> bytes:
    section = {"quant_method": method, "bits": 4, "group_size": 128}
    return json.dumps({"model_type": "llama", "quantization_config": section}).encode()


PREPARE = ("prepare", "RECIPE")
PAIRS = {"p.jsonl": b'{"query": "fish", "positive": "trout"}\n'}
DEEPSPEED = {"deepspeed": "TMP/ds.json"}

MISTAKES = {
    # The recipe.
    "no recipe": Mistake(
        "recipe TMP/none.yaml not found: give the path of a YAML file, e.g. recipes/smoke_mntp.yaml",
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
    "wrong type": Mistake(
        "TMP/r.yaml: `batch.global_batch_size`: Input should be a valid integer, … (got 'many')",
        ("train", "RECIPE", "batch.global_batch_size=many"),
    ),
    "two mistakes, one line": Mistake(
        "TMP/r.yaml: `data.path` is missing; unknown key `sed`: did you mean `seed`?",
        changes={"data": {}, "sed": 1},
    ),
    "unknown stage": Mistake(
        "TMP/r.yaml: `stage`: Input should be … (got 'mlm')", ("train", "RECIPE", "stage=mlm")
    ),
    "section of another stage": Mistake(
        "TMP/r.yaml: section `mntp` has no effect in stage `simcse`: remove it", changes={"mntp": {}}
    ),
    "not key=value": Mistake(
        "override 'seed' is not key=value, e.g. optimizer.lr=1e-4", ("train", "RECIPE", "seed")
    ),
    "an infinite learning rate": Mistake(
        "TMP/r.yaml: `optimizer.lr`: Input should be a finite number (got inf)",
        ("train", "RECIPE", "optimizer.lr=.inf"),
    ),
    "a pair of floats, one no number": Mistake(
        "TMP/r.yaml: `optimizer.betas.1`: Input should be a finite number (got nan)",
        ("train", "RECIPE", "optimizer.betas=[0.9, .nan]"),
    ),
    "a machine without end": Mistake(
        "TMP/r.yaml: `machine.memory_gib`: Input should be a finite number (got 'inf')",
        ("plan", "RECIPE", "--gpu-memory-gib", "inf"),
    ),
    "a batch of one text": Mistake(
        "TMP/r.yaml: batch.global_batch_size=1 leaves the simcse loss without negatives, so that it is "
        "always 0: raise it",
        ("train", "RECIPE", "batch.global_batch_size=1"),
    ),
    "a batch of one pair, its negatives not read": Mistake(
        "TMP/r.yaml: batch.global_batch_size=1 leaves the supervised loss without negatives, so that it is "
        "always 0: raise it",
        ("train", "TMP/r.yaml", "stage=supervised", "simcse=null", "batch.global_batch_size=1"),
        {"data": {"path": "TMP/p.jsonl", "pairs": {"max_negatives": 0}}},
        PAIRS,
    ),
    "a batch of one pair without negative": Mistake(
        "batch.global_batch_size=1: 1 of 2 examples have no hard negative, so that their loss is always 0: "
        "raise it, or give each of them a negative",
        ("train", "TMP/r.yaml", "stage=supervised", "simcse=null", "batch.global_batch_size=1"),
        {"data": {"path": "TMP/p.jsonl", "max_tokens": 64}},
        {
            "p.jsonl": b'{"query": "a", "positive": "b", "negative": "c"}\n'
            b'{"query": "d", "positive": "e", "negative": []}\n'
        },
    ),
    # Its data.
    "no data file": Mistake(
        "data file TMP/none.txt not found (relative paths start at ROOT)", PREPARE, data("none.txt")
    ),
    "empty folder": Mistake(
        "data.path 'TMP/empty' names no file of a known format (.txt, .jsonl, .csv, .parquet)",
        PREPARE,
        data("empty"),
        files={"empty/notes.md": b"x"},
    ),
    "unknown format": Mistake(
        "data file TMP/a.docx: unknown format '.docx', use one of .txt, .jsonl, .csv, .parquet, plain or "
        "with .gz, .bz2, .xz",
        PREPARE,
        data("a.docx"),
        files={"a.docx": b"x"},
    ),
    "wrong column": Mistake(
        "TMP/a.jsonl, line 1: no column 'text'; set data.text_column to one of: title, body",
        PREPARE,
        data("a.jsonl"),
        files={"a.jsonl": b'{"title": "a", "body": "b"}\n'},
    ),
    "broken JSON": Mistake(
        "TMP/a.jsonl, line 2: not valid JSON: …",
        PREPARE,
        data("a.jsonl"),
        files={"a.jsonl": b'{"text": "one"}\n{"text": \n'},
    ),
    "broken CSV": Mistake(
        "TMP/a.csv, after line 0: not a CSV file in UTF-8: …",
        PREPARE,
        data("a.csv"),
        files={"a.csv": b"text\ncaf\xe9\n"},
    ),
    "broken Parquet": Mistake(
        "TMP/a.parquet: not a Parquet file: …", PREPARE, data("a.parquet"), files={"a.parquet": b"PAR1 no"}
    ),
    "cut gzip": Mistake(
        "TMP/a.txt.gz: cannot be read: Compressed file ended before the end-of-stream marker was reached",
        PREPARE,
        data("a.txt.gz"),
        files={"a.txt.gz": gzip.compress(b"the river runs\n" * 999)[:40]},
    ),
    "not xz": Mistake(
        "TMP/a.txt.xz: cannot be read: …", PREPARE, data("a.txt.xz"), files={"a.txt.xz": b"plain text"}
    ),
    "UTF-16": Mistake(
        "TMP/a.txt is UTF-16: convert it first, iconv -f UTF-16 -t UTF-8",
        PREPARE,
        data("a.txt"),
        files={"a.txt": "the river".encode("utf-16")},
    ),
    "no text": Mistake(
        "TMP/a.txt: no text in it (2 blank, 1 binary)",
        PREPARE,
        data("a.txt"),
        files={"a.txt": b"\n  \nPK\0\n"},
    ),
    "two formats": Mistake(
        "data files of several formats (.csv, .txt): use one format a recipe",
        PREPARE,
        data("both"),
        files={"both/a.txt": b"a\n", "both/b.csv": b"text\nb\n"},
    ),
    "hub data without network": Mistake(
        "hub data set hub:owner/name cannot be streamed (…): check name, split and network",
        PREPARE,
        {"data": {"path": "hub:owner/name"}},
    ),
    "template without text": Mistake(
        "data.template 'Query: ' must hold {text} once and {instruction} at most once",
        PREPARE,
        data("texts.txt", template="Query: "),
    ),
    "no chat template": Mistake(
        "data.template is `chat`, but the tokenizer has no chat template: write the form out",
        PREPARE,
        data("texts.txt", template="chat"),
    ),
    "long instruction": Mistake(
        "instruction and special tokens take 9 of max_tokens=9: raise max_tokens or shorten the instruction",
        PREPARE,
        data("texts.txt", max_tokens=9, instruction="the river runs past an old mill"),
    ),
    "prepared_dir below a file": Mistake(
        "prepared texts in TMP/texts.txt/p cannot be written: Not a directory: choose a path that you can "
        "write to",
        PREPARE,
        data("texts.txt", prepared_dir="TMP/texts.txt/p"),
    ),
    # Its model.
    "no model folder": Mistake(
        "model 'TMP/none' cannot be loaded: there is no such folder, and a hub id has the form owner/name",
        changes={"model": {"path": "TMP/none"}},
    ),
    "hub model without network": Mistake(
        "model 'owner/name' cannot be loaded: there is no such folder, and …: give a folder, or connect to "
        "the network",
        changes={"model": {"path": "owner/name"}},
    ),
    "folder without weights": Mistake(
        "model 'TMP/llama' cannot be loaded: … no file named model.safetensors…",
        changes={"model": {"path": "TMP/llama"}},
    ),
    "broken weights": Mistake(
        "model 'TMP/llama' cannot be loaded: … header …",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/model.safetensors": b"half a file"},
    ),
    "weights that are a pickle with code": Mistake(
        "model 'TMP/llama' cannot be loaded: its weights are a pickle that is damaged or holds more than "
        "tensors, and nothing in it was run: use a copy of the model with weights in safetensors",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/pytorch_model.bin": b"cos\ngetcwd\n(tR."},
    ),
    "empty weights": Mistake(
        "model 'TMP/llama' cannot be loaded: its weights are a pickle that is damaged …",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/pytorch_model.bin": b""},
    ),
    "quantised weights without their package": Mistake(
        "model 'TMP/llama' cannot be loaded: Loading a GPTQ quantized model requires optimum (`pip install "
        "optimum`)",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/config.json": quantised_config("gptq")},
    ),
    "quantised weights of another package": Mistake(
        "model 'TMP/llama' cannot be loaded: … requires gptqmodel. Please install it with `pip install "
        "gptqmodel`",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/config.json": quantised_config("awq")},
    ),
    "a model of its own code": Mistake(
        "model 'TMP/llama' cannot be loaded: it needs its own code, and only a recipe (of train, prepare "
        "or plan) can allow that: read the code, then set model.trust_remote_code=true",
        changes={"model": {"path": "TMP/llama"}},
        files={"llama/config.json": b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'},
    ),
    "falcon": Mistake(
        "model type 'falcon' cannot be made bidirectional: transformers gives FalconModel no is_causal "
        "switch. Use a type that has it, such as llama, mistral, qwen3 or gemma, or a newer transformers",
        changes={"model": {"path": "TMP/falcon"}},
    ),
    "slow tokenizer": Mistake(
        "ByT5Tokenizer gives no character offsets: use a model with a tokenizer.json (a fast tokenizer), or "
        "convert it with AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        PREPARE,
        {"model": {"path": "TMP/byt5"}},
    ),
    "mask token": Mistake(
        "mntp.mask_token 'zzz zzz' is 7 tokens of this tokenizer: choose a string that is one, such as '_' "
        "or '<mask>'",
        changes={"mntp": {"mask_token": "zzz zzz"}},
        stage="mntp",
    ),
    "layers without adapters": Mistake(
        "adapter.target_modules ['query']: …; linear layers here: down_proj, gate_proj, k_proj, o_proj, "
        "q_proj, up_proj, v_proj",
        changes={"adapter": {"target_modules": ["query"]}},
    ),
    # Its batch and its engine.
    "batch larger than data": Mistake(
        "64 texts do not fill one batch of 1000: lower batch.global_batch_size or give more data",
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
        'DeepSpeed config TMP/ds.json: `zero_optimization.stage` is "auto", give a value (or leave the key '
        "out)",
        changes=DEEPSPEED,
        files={"ds.json": b'{"zero_optimization": {"stage": "auto"}}'},
    ),
    "unknown ZeRO stage": Mistake(
        "DeepSpeed refuses a section (DeepSpeedZeroConfig) of the JSON that `deepspeed` names: `stage`: …",
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
        "several ranks need MASTER_ADDR and MASTER_PORT: the node and port of rank 0",
        variables={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    # Where it goes.
    "a run is there": Mistake(
        "TMP/run already holds a run: go on with it by resume=true, choose another output_dir, or pass "
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
    # Encoding.
    "no input": Mistake("data file TMP/none not found (relative paths start at …)", encode(input="none")),
    "empty input": Mistake("--input TMP/a.txt is empty", encode(input="a.txt"), files={"a.txt": b""}),
    "binary input": Mistake(
        "text 1 (counted from 0) is not text: remove it, or get NaN in its place with bad texts `nan`",
        encode(input="a.txt"),
        files={"a.txt": b"one\n\xff\0\n"},
    ),
    "input of an unknown format": Mistake(
        "data file TMP/a.doc: unknown format '.doc', use one of .txt, …",
        encode(input="a.doc"),
        files={"a.doc": b"one"},
    ),
    "no such column to encode": Mistake(
        "TMP/p.jsonl, line 1: no column 'text'; set --text-column to one of: query, positive",
        encode(input="p.jsonl"),
        files=PAIRS,
    ),
    "blank line": Mistake(
        "text 1 (counted from 0) is empty: remove it, or get NaN in its place with bad texts `nan`",
        encode(input="a.txt"),
        files={"a.txt": b"one\n\ntwo\n"},
    ),
    "unknown kind of bad texts": Mistake(
        "--bad-texts 'skip' is unknown: choose raise or nan", encode("--bad-texts", "skip")
    ),
    "not .npy": Mistake(
        "--output TMP/v.txt must end in .npy, .jsonl, .parquet, or name a folder", encode(output="v.txt")
    ),
    "unknown format of shards": Mistake(
        "--format 'csv' is unknown: choose one of npy, jsonl, parquet", encode("--format", "csv", output="v")
    ),
    "output is there": Mistake(
        "--output TMP/v.npy exists: choose another, or give --overwrite", encode(), files={"v.npy": b"x"}
    ),
    "not a shard": Mistake(
        "--shard '4/4' must be I/N with 0 ≤ I < N, such as 0/16", encode("--shard", "4/4", output="v")
    ),
    "shard of a file": Mistake(
        "--shard needs a folder, --output TMP/v.npy is a file: drop .npy", encode("--shard", "0/4")
    ),
    "shard of standard input": Mistake(
        "--shard needs a file as --input: standard input is read once",
        ("encode", "--model", "MODEL", "--input", "-", "--output", "TMP/v", "--shard", "0/2"),
    ),
    "unknown prompt": Mistake(
        "prompt_name 'query' is unknown; this encoder's prompts: none", encode("--prompt-name", "query")
    ),
    "too many dimensions": Mistake(
        "truncate_dim=33: vectors have 32 dimensions", encode("--truncate-dim", "33")
    ),
    "output below a file": Mistake(
        "--output TMP/texts.txt/v.npy cannot be written: …: choose a path that you can write to",
        encode(output="texts.txt/v.npy"),
    ),
    "unknown attention": Mistake("unknown attention backend 'eager': …", encode("--attention", "eager")),
    "unknown precision": Mistake(
        "precision 'fp8' is unknown: choose auto, fp32 or bf16", encode("--precision", "fp8")
    ),
    "nothing to search": Mistake(
        "TMP/none holds no vectors: write some with llm2vec-ds encode", ("search", "TMP/none", "trout")
    ),
    # Export.
    "nothing to export": Mistake(
        "TMP/none holds no encoder: give a run's folder, a demo's, or an encoder folder",
        ("export", "TMP/none", "--output", "TMP/out"),
    ),
    "prompt without a name": Mistake(
        "--prompt 'query' is not NAME=TEXT, such as query=Find passages that answer",
        ("export", "TMP/none", "--output", "TMP/out", "--prompt", "query"),
    ),
    # The demo.
    "unknown budget": Mistake(
        "--budget 'huge' is not one of quick, default, full",
        ("demo", "--output", "TMP/demo", "--budget", "huge"),
    ),
    "no graded pairs": Mistake(
        "TMP/p.csv: No such file or directory", ("demo", "--output", "TMP/demo", "--sts", "TMP/p.csv")
    ),
    "pairs without score": Mistake(
        "TMP/p.csv, data row 1: expected sentence1, sentence2, score (a number)",
        ("demo", "--output", "TMP/demo", "--sts", "TMP/p.csv"),
        files={"p.csv": b"one,two\n"},
    ),
    # Mining.
    "no pairs to mine": Mistake("data file TMP/p.jsonl not found (relative paths start at ROOT)", mine()),
    "pairs without columns": Mistake(
        "TMP/texts.txt: pairs need columns: use .jsonl, .csv or .parquet", mine(pairs="texts.txt")
    ),
    "no such column of pairs": Mistake(
        "TMP/p.jsonl, line 1: no column 'question'; set --query-column to one of: query, positive",
        mine("--query-column", "question"),
        files=PAIRS,
    ),
    "no such column of the corpus": Mistake(
        "TMP/c.jsonl, line 1: no column 'text'; set --corpus-column to one of: title",
        mine("--corpus", "TMP/c.jsonl"),
        files=PAIRS | {"c.jsonl": b'{"title": "rain"}\n'},
    ),
    "blank corpus": Mistake(
        "--corpus holds no text", mine("--corpus", "TMP/c.txt"), files=PAIRS | {"c.txt": b" \n"}
    ),
    "blank pairs": Mistake(
        "--pairs holds no pair", mine(), files={"p.jsonl": b'{"query": "", "positive": "trout"}\n'}
    ),
    "ranks reversed": Mistake(
        "--first-rank 60 is over --last-rank 50: swap them", mine("--first-rank", "60"), files=PAIRS
    ),
    "too few ranks": Mistake(
        "--negatives 5 is over the 3 ranks from 48 to 50: raise --last-rank",
        mine("--first-rank", "48"),
        files=PAIRS,
    ),
    "unknown sampling": Mistake(
        "--sampling 'best' is unknown: choose top or random", mine("--sampling", "best"), files=PAIRS
    ),
    "a margin without end": Mistake(
        "--margin inf is not a finite number: give one such as 0.05", mine("--margin", "inf"), files=PAIRS
    ),
    "mined already": Mistake(
        "--output TMP/m.jsonl exists: choose another, or give --overwrite",
        mine(),
        files=PAIRS | {"m.jsonl": b"precious"},
    ),
    "mined into another format": Mistake(
        "--output TMP/m.csv must end in .jsonl", mine(output="m.csv"), files=PAIRS
    ),
    "mined into no folder": Mistake(
        "--output TMP/texts.txt/m.jsonl cannot be written: Not a directory: choose a path that you can write "
        "to",
        mine(output="texts.txt/m.jsonl"),
        files=PAIRS,
    ),
    "mined by no model": Mistake(
        "model 'TMP/none' cannot be loaded: …",
        ("mine", "--model", "TMP/none", "--pairs", "TMP/p.jsonl", "--output", "TMP/m.jsonl"),
        files=PAIRS,
    ),
    "a demo is there": Mistake(
        "TMP/demo already holds a demo: choose another --output or remove it",
        ("demo", "--output", "TMP/demo"),
        files={"demo/metrics.json": b"{}"},
    ),
    "demo output is a file": Mistake(
        "--output TMP/texts.txt cannot be written: File exists: choose a path that you can write to",
        ("demo", "--output", "TMP/texts.txt", "--model", "MODEL"),
    ),
}


def snapshot(folder: Path) -> Files:
    """Every file below `folder` but those of the cache, with its content."""
    files = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def other_models(tmp_path: Path) -> None:
    """Folders that look like models: a Llama without weights, a falcon, a slow tokenizer."""
    for name in ("llama", "falcon"):
        AutoConfig.for_model(name).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    from transformers import ByT5Tokenizer

    AutoConfig.for_model("llama").save_pretrained(tmp_path / "byt5")
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("other_models")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(
    name: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mistake = MISTAKES[name]
    words = {"TMP": str(tmp_path), "MODEL": str(tiny_model_dir), "ROOT": str(Path.cwd())}

    def filled(text: str) -> str:
        return re.sub("|".join(words), lambda found: words[found.group()], text)

    (tmp_path / "texts.txt").write_text("\n".join(sentences(64)) + "\n")
    for file, content in mistake.files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    values = recipe(mistake.stage, tiny_model_dir, tmp_path / "texts.txt", tmp_path / "run")
    values |= json.loads(filled(json.dumps(mistake.changes)))
    words["RECIPE"] = str(write_recipe(values, tmp_path / "r.yaml"))
    for variable, value in mistake.variables.items():
        monkeypatch.setenv(variable, value)
    before = snapshot(tmp_path)

    assert run(monkeypatch, *map(filled, mistake.arguments)) == 2
    assert_reads(error_line(capsys), filled(mistake.line))
    after = snapshot(tmp_path)
    for name in {"run/recipe.yaml", "run/run.json"} - before.keys():
        after.pop(name, None)
    assert after == before


def test_there_are_many() -> None:
    assert len(MISTAKES) >= 25


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (
            "GatedRepoError",
            "model 'owner/name' cannot be loaded: it is gated: accept its terms at "
            "https://huggingface.co/owner/name, then run `hf auth login` or set HF_TOKEN",
        ),
        (
            "RepositoryNotFoundError",
            "model 'owner/name' cannot be loaded: there is no such folder, and no such model on the hub (a "
            "private one needs `hf auth login`)",
        ),
    ],
)
def test_what_the_hub_refuses(
    refusal: str,
    expected: str,
    tmp_path: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The hub's client answers as it would; transformers wraps that in its own OSError."""
    from huggingface_hub import errors
    from transformers.utils import hub

    def refuse(*_: object, **__: object) -> None:
        raise getattr(errors, refusal)("401 Client Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    values = recipe("mntp", Path("owner/name"), texts_file, tmp_path / "run")
    assert run(monkeypatch, "train", write_recipe(values, tmp_path / "r.yaml")) == 2
    assert_reads(error_line(capsys), expected)


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
        f"llm2vec-ds: error: rank 0 of 2 does not meet the others at 127.0.0.1:{place['MASTER_PORT']} (…"
        "address already in use): start every rank, each with this MASTER_ADDR and a MASTER_PORT that is "
        "free on rank 0's node and open to the others",
    )


FREE_SOME = "cannot be written: …: free some space, or write to another disk"


def test_a_full_disk_while_preparing(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = recipe("mntp", tiny_model_dir, texts_file, tmp_path / "run")
    path = write_recipe(values, tmp_path / "r.yaml")
    where = f"data.prepared_dir={tmp_path / 'p'}"
    with full_disk(4000):
        assert run(monkeypatch, "prepare", path, where) == 2
    assert_reads(error_line(capsys), f"prepared texts in {tmp_path / 'p'} {FREE_SOME}")
    assert not list((tmp_path / "p").glob("[!.]*"))
    assert run(monkeypatch, "prepare", path, where) == 0
    assert "64 rows" in capsys.readouterr().out


def test_a_full_disk_for_vectors(
    tmp_path: Path,
    tiny_model_dir: Path,
    texts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "v.npy"
    output.write_bytes(b"precious")
    files = ["--input", texts_file, "--output", output, "--overwrite"]
    with full_disk(4000):
        assert run(monkeypatch, "encode", "--model", tiny_model_dir, *files) == 2
    assert_reads(error_line(capsys), f"--output {output} {FREE_SOME}")
    assert output.read_bytes() == b"precious"
    assert run(monkeypatch, "encode", "--model", tiny_model_dir, *files) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.npy", "v.npy.json"]


@pytest.mark.parametrize(
    ("bytes_per_file", "max_steps", "what"),
    [(1600, 10, "metrics.jsonl"), (30_000, 2, "encoder")],
    ids=["metrics", "encoder"],
)
def test_a_full_disk_in_an_otherwise_fine_run(
    bytes_per_file: int,
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
    with full_disk(bytes_per_file):
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


@pytest.mark.parametrize("arguments", [["frobnicate"], ["encode"], ["train"], ["doctor", "--chek"]])
def test_usage_errors_stay_usual(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "Usage: llm2vec-ds" in error
    assert "Traceback" not in error
