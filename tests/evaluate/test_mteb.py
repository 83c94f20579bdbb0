"""MTEB on local data: the same scores as sentence-transformers, instructions, resuming, ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch

from llm2vec_ds import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.mteb import (
    MtebEncoder,
    Score,
    evaluate_mteb,
    model_meta,
    read_instructions,
    summary,
    table,
    write_summary,
)
from llm2vec_ds.evaluate.mteb_tasks import SUBSETS, tasks_for
from llm2vec_ds.evaluate.scores_file import OF_MTEB, OF_WORDS
from llm2vec_ds.evaluate.shards import RankEncoder, ShardedEncoder
from llm2vec_ds.evaluate.word_task import WordTask, _key
from tests.support.evaluation_files import conllu
from tests.support.in_process import error_line, run
from tests.support.model_types import build
from tests.support.ranks import run_ranks
from tests.support.tiny import save_tiny_llama, sentences, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder whose tokenizer adds nothing, so that mean pooling over all tokens is ours."""
    path = tmp_path_factory.mktemp("encoder")
    Encoder(tiny_llama(is_causal=False).base_model, tiny_tokenizer(bos=False)).save(path / "encoder")
    return path / "encoder"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local data of all four kinds."""
    path = tmp_path_factory.mktemp("data")
    texts = sentences(60)
    rng = np.random.default_rng(0)
    rows = [f"{a},{b},{rng.uniform(0, 5):.2f}" for a, b in zip(texts[:30], texts[30:], strict=True)]
    (path / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(rows) + "\n")
    labels = ["even" if len(text.split()) % 2 == 0 else "odd" for text in texts]
    lines = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    (path / "labels.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    split = [f"{line},{'train' if i % 3 else 'test'}" for i, line in enumerate(lines)]
    (path / "split.csv").write_text("text,label,split\n" + "\n".join(split) + "\n")
    beir = path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "title": "", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    (beir / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(texts[:10]))
    )
    pairs = "".join(f"q{i}\td{(i + i % 2) % 60}\t1\n" for i in range(10))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + pairs)
    return path


def names(data: Path) -> list[str]:
    return [
        f"sts:{data / 'pairs.csv'}",
        f"retrieval:{data / 'beir'}",
        f"clustering:{data / 'labels.csv'}",
        f"classification:{data / 'split.csv'}",
    ]


def wrapped(folder: Path, tokens: int = 512, instructions: dict[str, str] | None = None) -> MtebEncoder:
    encoder = RankEncoder(Encoder.from_pretrained(folder, attention="torch"), tokens)
    return MtebEncoder(encoder, model_meta(str(folder), encoder, instructions), instructions)


def test_scores_are_those_of_sentence_transformers(folder: Path, data: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=256)
    other = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    ours = evaluate_mteb(wrapped(folder), tasks_for(names(data)), tmp_path / "ours")
    assert [score.type for score in ours] == ["STS", "Retrieval", "Clustering", "Classification"]
    for score, task in zip(ours, tasks_for(names(data)), strict=True):
        result = mteb.evaluate(other, task, cache=None, co2_tracker=False, show_progress_bar=False)
        assert score.value == pytest.approx(float(result.task_results[0].get_score()), abs=1e-4)
    retrieval = ours[1]
    # Half of the queries look for themselves, which any encoder finds; their neighbours it need not.
    assert 0.5 <= retrieval.value < 1
    assert "| STS-pairs | STS | cosine_spearman |" in table(
        summary("m", wrapped(folder).mteb_model_meta, ours)
    )


def test_scores_do_not_depend_on_the_micro_batch(folder: Path, data: Path, tmp_path: Path) -> None:
    small, large = (
        evaluate_mteb(wrapped(folder, tokens), tasks_for(names(data)[:2]), tmp_path / str(tokens))
        for tokens in (512, 4096)
    )
    assert [s.value for s in small] == pytest.approx([s.value for s in large], abs=1e-6)


def test_results_are_kept_and_measured_again_when_data_change(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text((data / "pairs.csv").read_text())
    asked: list[int] = []
    encode = RankEncoder.encode

    def counted(self: Any, texts: list[str], instruction: str | None = None) -> np.ndarray:
        asked.append(len(texts))
        return encode(self, texts, instruction)

    monkeypatch.setattr(RankEncoder, "encode", counted)
    first = evaluate_mteb(wrapped(folder), tasks_for([f"sts:{file}"]), tmp_path / "results")
    n_calls = len(asked)
    assert n_calls > 0
    assert evaluate_mteb(wrapped(folder), tasks_for([f"sts:{file}"]), tmp_path / "results") == first
    assert len(asked) == n_calls
    file.write_text("\n".join(file.read_text().splitlines()[:-5]) + "\n")
    again = evaluate_mteb(wrapped(folder), tasks_for([f"sts:{file}"]), tmp_path / "results")
    assert len(asked) == 2 * n_calls
    assert again != first
    assert list((tmp_path / "results" / "results").glob("*/*/STS-pairs.json"))


def test_later_tasks_of_a_model_are_added(folder: Path, tmp_path: Path) -> None:
    meta = wrapped(folder).mteb_model_meta

    def written(model: str, *tasks: str) -> dict[str, Any]:
        scores = [Score(name, "STS", "cosine_spearman", float(len(name))) for name in tasks]
        write_summary(summary(model, meta, scores), tmp_path)
        found: dict[str, Any] = json.loads((tmp_path / "scores.json").read_text())
        return found

    assert list(written("a", "one", "three")["tasks"]) == ["one", "three"]
    both = written("a", "fifth", "one")
    assert list(both["tasks"]) == ["one", "three", "fifth"]
    assert both["mean"] == pytest.approx(13 / 3)
    assert list(written("b", "one")["tasks"]) == ["one"]
    assert (tmp_path / "scores.md").read_text().startswith("b\n\n| task |")


def test_another_model_or_instruction_is_another_revision(folder: Path, tmp_path: Path) -> None:
    plain = wrapped(folder).mteb_model_meta.revision
    assert plain == wrapped(folder).mteb_model_meta.revision
    assert wrapped(folder, instructions={"a": "b"}).mteb_model_meta.revision != plain
    causal = Encoder.from_pretrained(folder, causal=True)
    assert model_meta(str(folder), RankEncoder(causal), None).revision != plain
    other = save_tiny_llama(tmp_path / "other")
    assert wrapped(other).mteb_model_meta.revision != plain


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_attention_is_part_of_a_result_whatever_switch_the_model_has(model_type: str, tmp_path: Path) -> None:
    """Gemma 3 has a switch of its own, and no `is_causal`."""
    data = conllu(tmp_path / "words.conllu", 5)
    task, keys = WordTask(str(data), str(data)), set()
    for causal in (False, True):
        encoder = Encoder(build(model_type, causal=causal).base_model, tiny_tokenizer())
        assert encoder.causal == causal
        keys.add(model_meta("model", RankEncoder(encoder), None).revision)
        keys.add(_key(encoder, "model", task, str(data)))
    assert len(keys) == 4


def test_scores_of_the_other_command_are_refused(
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is measured."""
    file, words = tmp_path / "scores.json", str(conllu(tmp_path / "words.conllu", 5))
    mteb = ["mteb", "--task", f"sts:{data / 'pairs.csv'}"]
    of_words = ["words", "--train", words, "--test", words]
    for written, asked, other in ((OF_WORDS, mteb, "words"), (OF_MTEB, of_words, "mteb")):
        file.write_text(json.dumps({"model": "x", written: {}}))
        assert run(monkeypatch, "evaluate", *asked, "--model", folder, "--output", tmp_path) == 2
        assert error_line(capsys) == f"{file} was written by `evaluate {other}`: choose another --output"


def test_queries_get_the_instruction_and_documents_stay_bare(folder: Path) -> None:
    from mteb.types import PromptType

    scifact, sts = (mteb.get_task(name).metadata for name in ("SciFact", "STSBenchmark"))
    clustering = mteb.get_task("TwentyNewsgroupsClustering").metadata
    reranking = mteb.get_task("SciDocsRR").metadata
    own = wrapped(folder, instructions={"STSBenchmark": "Retrieve alike text.", "SciFact": "Find: "})
    default = wrapped(folder, instructions={})
    given = "Given a scientific claim, retrieve documents that support or refute the claim:"
    assert default.instruction(scifact, PromptType.query) == given
    assert default.instruction(clustering, None) == "Identify the topic or theme of the given news articles:"
    assert default.instruction(sts, None) is None
    assert own.instruction(scifact, PromptType.query) == "Find:"
    assert own.instruction(sts, None) == "Retrieve alike text:"
    for encoder in (own, default):
        assert encoder.instruction(scifact, PromptType.document) is None
        assert encoder.instruction(reranking, PromptType.document) is None
    assert wrapped(folder, instructions=None).instruction(scifact, PromptType.query) is None
    assert read_instructions(None) == {}
    assert read_instructions("none") is None


def test_an_instruction_reaches_the_encoder(folder: Path) -> None:
    encoder = wrapped(folder).encoder
    bare, instructed = encoder.encode(["the river runs"]), encoder.encode(["the river runs"], "bread:")
    assert np.abs(bare - instructed).max() > 1e-4


def test_an_empty_text_is_like_no_other(folder: Path) -> None:
    vectors = wrapped(folder).encoder.encode(["bread", "  ", "rain", "bread"])
    assert not vectors[1].any()
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert vectors[2].any()


def test_cross_validation_without_a_split(folder: Path, data: Path, tmp_path: Path) -> None:
    (score,) = evaluate_mteb(wrapped(folder), tasks_for([f"classification:{data / 'labels.csv'}"]), tmp_path)
    assert 0 < score.value <= 1


def _on_a_rank(rank: int, world: int) -> Any:
    sharded = ShardedEncoder(Encoder.from_pretrained(os.environ["TINY_MODEL"], attention="torch"))
    if rank:
        sharded.serve()
        return None
    vectors = [sharded.encode(sentences(n)) for n in (7, 1)]
    sharded.done()
    return [torch.from_numpy(v) for v in vectors]


def test_two_ranks_give_the_vectors_of_one(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_MODEL", str(tiny_model_dir))
    encoder = Encoder.from_pretrained(tiny_model_dir, attention="torch")
    (seven, one), _ = run_ranks(_on_a_rank, 2)
    np.testing.assert_allclose(seven, encoder.encode(sentences(7)), atol=1e-5)
    np.testing.assert_allclose(one, encoder.encode(sentences(1)), atol=1e-5)


def test_names_subsets_and_benchmarks() -> None:
    paper = tasks_for([], subset="paper15")
    assert len(paper) == 15
    assert {t.metadata.name: t.hf_subsets for t in paper}["STS17"] == ["en-en"]
    assert {t.metadata.name: t.hf_subsets for t in paper}["MassiveIntentClassification"] == ["en"]
    classic = {task.metadata.name for task in tasks_for([], benchmark="MTEB(eng, v1)")}
    assert {name.partition(":")[0] for name in SUBSETS["paper15"]} <= classic


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": []}, "nothing to evaluate"),
        ({"names": ["STSBenchmrk"]}, "Did you mean: 'STSBenchmark'"),
        ({"names": ["STS17:en-xx"]}, "no subset 'en-xx'"),
        ({"names": [], "benchmark": "MTEB(eng, v9)"}, "Did you mean"),
        ({"names": [], "subset": "paper16"}, "choose paper15"),
        ({"names": ["pairs.csv"]}, "--task pairs.csv does not say what to measure: write sts:pairs.csv, or"),
        (
            {"names": ["tests"]},
            "--task tests does not say what to measure: write retrieval:tests, or put sts:",
        ),
        ({"names": ["STSBenchmark", "STSBenchmark"]}, "two tasks have the name STSBenchmark"),
        ({"names": ["sts:no/such.csv"]}, "no such file"),
        ({"names": ["retrieval:{here}/a.csv"]}, "a.csv, line 2: no column 'query'"),
        ({"names": ["sts:{here}"]}, "needs a file"),
        ({"names": ["retrieval:{here}"]}, "corpus.jsonl is missing"),
        ({"names": ["clustering:{here}/a.csv"]}, "line 2: expected the columns text and label"),
        ({"names": ["clustering:{here}/one.csv"]}, "two different labels"),
        ({"names": ["classification:{here}/split.csv"]}, "no row has 'test'"),
        ({"names": ["clustering:{here}/bad.jsonl"]}, "line 1: not valid JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "one.csv").write_text("text,label\na,b\nc,b\n")
    (tmp_path / "split.csv").write_text("text,label,split\na,b,train\nc,d,train\n")
    (tmp_path / "bad.jsonl").write_text("{\n")
    given = {**given, "names": [name.replace("{here}", str(tmp_path)) for name in given["names"]]}
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        tasks_for(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "a: [", "a: {b: c}"])
def test_unusable_instructions(content: str, tmp_path: Path) -> None:
    file = tmp_path / "instructions.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match="--instructions"):
        read_instructions(str(file))
    with pytest.raises(UserError, match="No such file"):
        read_instructions(str(tmp_path / "missing.json"))


def test_data_that_the_hub_does_not_give_are_a_users_mistake(folder: Path, tmp_path: Path) -> None:
    """Tests run offline."""
    with pytest.raises(UserError, match="STSBenchmark: its data cannot be loaded from the hub"):
        evaluate_mteb(wrapped(folder), tasks_for(["STSBenchmark"]), tmp_path)


@pytest.mark.parametrize("kind", ["sts:pairs.csv", "classification:labels.csv", "retrieval:beir"])
def test_a_byte_order_mark_changes_nothing(kind: str, data: Path, tmp_path: Path) -> None:
    """As spreadsheets save UTF-8."""
    mark = b"\xef\xbb\xbf"
    name = kind.partition(":")[2]
    marked = tmp_path / name
    if (data / name).is_dir():
        shutil.copytree(data / name, marked)
        files = [marked / "qrels" / "test.tsv", marked / "queries.jsonl"]
    else:
        shutil.copy(data / name, marked)
        files = [marked]
    for file in files:
        file.write_bytes(mark + file.read_bytes().replace(b"\n", b"\r\n"))
    task = kind.partition(":")[0]
    (found,), (expected,) = (tasks_for([f"{task}:{place}"], None, None) for place in (marked, data / name))
    found.load_data()
    expected.load_data()
    assert str(found.dataset) == str(expected.dataset)


@pytest.mark.parametrize(
    ("rows", "mistake"),
    [
        ("a,0,train\nb,1,train\nc,2,test\n", "only test rows have the label '2'"),
        ("a,0,train\nb,0,train\nc,1,train\nd,0,test\n", None),
        ("a,0,train\nb,0,train\nc,1,test\n", "only test rows have the label '1'"),
    ],
)
def test_labels_of_test_rows_alone_are_refused(rows: str, mistake: str | None, tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_text(f"text,label,split\n{rows}")
    if mistake is None:
        assert tasks_for([f"classification:{file}"], None, None)
    else:
        with pytest.raises(UserError, match=mistake):
            tasks_for([f"classification:{file}"], None, None)
