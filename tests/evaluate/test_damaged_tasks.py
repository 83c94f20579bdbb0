"""Damaged data of tasks, damaged stored results, and models that give NaN: one line on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.mteb import MtebEncoder, evaluate_mteb, model_meta, read_instructions
from llm2vec_ds.evaluate.mteb_tasks import tasks_for
from llm2vec_ds.evaluate.shards import RankEncoder, ShardedEncoder
from tests.support.damage import DEEP, JSON_DAMAGE, RANDOM, damage, save_nan_llama
from tests.support.forked import own_environment
from tests.support.in_process import assert_reads, error_line, run
from tests.support.ranks import run_ranks
from tests.support.tiny import sentences


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [f"{a},{b},{i}" for i, (a, b) in enumerate(zip(sentences(9), sentences(9, seed=1), strict=True))]
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def measured(folder: Path, pairs: Path, output: Path) -> float:
    encoder = RankEncoder(Encoder.from_pretrained(folder))
    wrapped = MtebEncoder(encoder, model_meta(str(folder), encoder, {}), {})
    (score,) = evaluate_mteb(wrapped, tasks_for([f"sts:{pairs}"]), output)
    return score.value


@pytest.mark.parametrize("how", JSON_DAMAGE)
def test_a_damaged_stored_result_is_measured_again(
    how: str, tiny_model_dir: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    score = measured(tiny_model_dir, pairs, tmp_path / "results")
    (stored,) = (tmp_path / "results").rglob("STS-pairs.json")
    damage(stored, JSON_DAMAGE[how])
    assert measured(tiny_model_dir, pairs, tmp_path / "results") == score
    assert "STS-pairs: the stored result is damaged, measuring again" in caplog.text
    assert json.loads(stored.read_text())["task_name"] == "STS-pairs"


def test_a_model_that_gives_nan_is_one_line(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_nan_llama(tmp_path / "model")
    task = ["--task", f"sts:{pairs}", "--output", str(tmp_path / "results")]
    assert run(monkeypatch, "evaluate", "mteb", "--model", model, *task) == 2
    line = (
        "text … gets no finite vector: the model's weight layers.1… is not finite: get the model from its …"
    )
    assert_reads(error_line(capsys), line)


def test_a_file_in_place_of_the_results(
    tiny_model_dir: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--task", f"sts:{pairs}", "--output", str(pairs / "results")]
    assert run(monkeypatch, "evaluate", "mteb", "--model", tiny_model_dir, *arguments) == 2
    assert_reads(
        error_line(capsys), f"--output {pairs / 'results'} cannot be written: Not a directory: choose …"
    )


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """In a process of its own: mteb is imported already here."""
    (tmp_path / "file").write_bytes(b"")
    environment = {**own_environment(), "MTEB_CACHE": str(tmp_path / "file" / "cache")}
    line = [sys.executable, "-m", "llm2vec_ds", "evaluate", "mteb", "--model", "x"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert_reads(
        said, "llm2vec-ds: error: mteb's cache (the folder MTEB_CACHE, else …) cannot be written: Not …"
    )


def _encode_on_a_rank(rank: int, world: int) -> Any:
    sharded = ShardedEncoder(Encoder.from_pretrained(os.environ["TINY_MODEL"], attention="torch"))
    if rank:
        sharded.serve()
        return None
    try:
        sharded.encode(["fish"])  # the other rank's share is empty
    except UserError as error:
        return str(error)
    finally:
        sharded.done()


def test_no_rank_waits_for_one_that_met_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_MODEL", str(save_nan_llama(tmp_path)))
    said, nothing = run_ranks(_encode_on_a_rank, 2)
    assert said.startswith("text 0 (counted from 0) gets no finite vector: ")
    assert nothing is None


GOOD = {
    "corpus.jsonl": b'{"_id": "d", "title": "", "text": "trout"}\n',
    "queries.jsonl": b'{"_id": "q", "text": "fish"}\n',
    "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq\td\t1\n",
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", RANDOM, "corpus.jsonl, line 1: not valid JSON: "),
        ("corpus.jsonl", b'{"_id": "d", "title": [1], "text": "trout"}\n', "and a title must be a text"),
        ("queries.jsonl", DEEP, "queries.jsonl, line 1: not valid JSON: it is nested too deeply"),
        ("qrels/test.tsv", RANDOM, "test.tsv is not text in UTF-8"),
    ],
)
def test_damaged_retrieval_data_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    for file, good in GOOD.items():
        (tmp_path / file).write_bytes(good)
    assert tasks_for([f"retrieval:{tmp_path}"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        tasks_for([f"retrieval:{tmp_path}"])
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [RANDOM, b"[" * 5000 + b"]" * 5000, b"[1]"])
def test_damaged_instructions_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "i.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"--instructions .+i\.yaml"):
        read_instructions(str(tmp_path / "i.yaml"))
