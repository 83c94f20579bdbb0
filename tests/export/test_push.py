"""What `export --push` uploads, to a stand-in for the hub; the card is what the hub's own parser reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.support.encoder_folders import make
from tests.support.hub import Hub, hub

TOKEN = "hf_of_nobody"
SCORES = {
    "model": "x/encoder",
    "tasks": {"STS12": {"type": "STS", "metric": "cosine_spearman", "main_score": 0.61234567}},
}


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    with hub() as state:
        yield state


def pushed(stand_in: Hub, folder: Path, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command, in a process that knows the stand-in as the hub."""
    variables = {"HF_ENDPOINT": stand_in.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    line = [sys.executable, "-m", "llm2vec_ds", "export", folder / "encoder", *words]
    outcome = subprocess.run(
        list(map(str, line)),
        env={**os.environ, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == code, outcome.stderr
    return outcome


def metadata(stand_in: Hub, name: str) -> dict[str, Any]:
    """As the hub reads the front matter of the card."""
    card = ModelCard(stand_in.files[name]["README.md"].decode())
    found: dict[str, Any] = card.data.to_dict()
    return found


def test_a_folder_goes_as_one_private_commit(stand_in: Hub, tmp_path: Path) -> None:
    make(tmp_path / "encoder", prompts={"query": "Find bread:"})
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    said = pushed(
        stand_in,
        tmp_path,
        *("--output", "out", "--push", "team/encoder"),
        *("--licence", "apache-2.0", "--scores", "scores.json"),
    ).stdout
    assert said.strip() == f"{stand_in.address}/team/encoder/commit/abc"
    assert stand_in.created == [{"name": "encoder", "organization": "team", "visibility": "private"}]
    (summary,) = stand_in.summaries
    assert summary.startswith("Exported by LLM2Vec-DS")
    files = stand_in.files["team/encoder"]
    assert {"model.safetensors", "config.json", "modules.json", "1_Pooling/config.json"} < files.keys()
    assert "llm2vec_ds_files.json" not in files
    for name, content in files.items():
        assert content == (tmp_path / "out" / name).read_bytes()
    found = metadata(stand_in, "team/encoder")
    assert (found["license"], found["library_name"]) == ("apache-2.0", "sentence-transformers")
    (index,) = found["model-index"]
    assert index["name"] == "team/encoder"
    (result,) = index["results"]
    assert result["task"] == {"type": "STS"}
    assert result["metrics"] == [{"type": "cosine_spearman", "value": 0.612346}]
    card = files["README.md"].decode()
    for line in (
        'SentenceTransformer("team/encoder").encode(["a text"], prompt_name="query"',
        "vllm serve team/encoder --runner pooling",
        "text-embeddings-router --model-id team/encoder",
        'Encoder.from_pretrained("team/encoder")',
        "| STS | STS12 | cosine_spearman | 0.6123 |",
    ):
        assert line in card


def test_what_others_put_beside_it_stays_here(stand_in: Hub, tmp_path: Path) -> None:
    make(tmp_path / "encoder")
    pushed(stand_in, tmp_path, "--output", "out")
    (tmp_path / "out" / "notes.txt").write_text("private")
    pushed(stand_in, tmp_path, "--output", "out", "--overwrite", "--push", "team/encoder", "--no-private")
    assert "notes.txt" not in stand_in.files["team/encoder"]
    assert stand_in.created[0]["visibility"] == "public"
    pushed(stand_in, tmp_path, "--output", "out", "--overwrite", "--push", "team/encoder")  # is there already
    assert len(stand_in.created) == 1
    assert stand_in.tokens == {f"Bearer {TOKEN}"}


def test_a_dry_run_shows_files_and_card_and_asks_nothing(stand_in: Hub, tmp_path: Path) -> None:
    make(tmp_path / "encoder")
    said = pushed(stand_in, tmp_path, "--output", "out", "--push", "team/encoder", "--dry-run").stdout
    assert not stand_in.tokens
    first, *lines = said.splitlines()
    sizes = {name: int(size.replace(",", "")) for name, size in map(str.split, lines[: lines.index("")])}
    assert first == (
        f"team/encoder (private, if it is new): {len(sizes)} files, {sum(sizes.values()):,} bytes"
    )
    assert sizes["model.safetensors"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert said.rstrip().endswith((tmp_path / "out" / "README.md").read_text().rstrip())


def test_a_refusal_costs_one_line_and_keeps_the_export(stand_in: Hub, tmp_path: Path) -> None:
    make(tmp_path / "encoder")
    stand_in.refuses.add("others/encoder")
    said = pushed(stand_in, tmp_path, "--output", "out", "--push", "others/encoder", code=2).stderr
    last = said.splitlines()[-1]
    assert "error: --push others/encoder: " in last
    assert "You don't have the rights to create others/encoder" in last
    assert last.endswith("Log in with `hf auth login`")
    assert "Traceback" not in said
    assert TOKEN not in said
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not stand_in.files


@pytest.mark.slow
def test_a_hub_that_is_not_there_costs_one_line(stand_in: Hub, tmp_path: Path) -> None:
    make(tmp_path / "encoder")
    stand_in.address = "http://127.0.0.1:9"
    said = pushed(stand_in, tmp_path, "--output", "out", "--push", "team/encoder", code=2).stderr
    assert "error: --push team/encoder: " in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_gguf_goes_with_a_card(stand_in: Hub, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    make(tmp_path / "encoder")
    words = ("--output", "small.gguf", "--format", "gguf", "--licence", "mit", "--push", "team/small")
    pushed(stand_in, tmp_path, *words)
    files = stand_in.files["team/small"]
    assert sorted(files) == ["README.md", "small.gguf"]
    assert files["small.gguf"] == (tmp_path / "small.gguf").read_bytes()
    assert metadata(stand_in, "team/small")["library_name"] == "llama.cpp"
    card = files["README.md"].decode()
    assert "hf download team/small --local-dir FOLDER" in card
    assert "llama-server -m FOLDER/small.gguf --embeddings --ubatch-size 512 --flash-attn off" in card
    assert not (tmp_path / "README.md").exists()


@pytest.mark.slow
def test_a_graph_goes_with_a_card(stand_in: Hub, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    make(tmp_path / "encoder")
    pushed(stand_in, tmp_path, "--output", "out", "--format", "onnx", "--push", "team/graph")
    files = stand_in.files["team/graph"]
    assert {"onnx/model.onnx", "tokenizer.json", "README.md"} < files.keys()
    assert metadata(stand_in, "team/graph")["library_name"] == "transformers.js"
    assert "hf download team/graph --local-dir FOLDER" in files["README.md"].decode()
