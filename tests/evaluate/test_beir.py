"""Folders in BEIR's layout, as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.beir import read_beir
from llm2vec_ds.evaluate.mteb import MtebEncoder, measure, model_meta
from llm2vec_ds.evaluate.mteb_tasks import tasks_for
from llm2vec_ds.evaluate.shards import ShardedEncoder

QRELS = "query-id\tcorpus-id\tscore\n0\t1\t1\n1\t0\t1\n"


def folder(path: Path, qrels: str = QRELS, ids: tuple[Any, Any] = ("0", "1")) -> Path:
    """Each query is a document, too."""
    (path / "qrels").mkdir(parents=True)
    rows = [{"_id": own, "title": None, "text": f"river number {own} runs"} for own in ids]
    for name in ("corpus", "queries"):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "qrels" / "test.tsv").write_text(qrels)
    return path


@pytest.mark.parametrize(
    "qrels",
    [QRELS, QRELS.partition("\n")[2], "\ufeff" + QRELS, "0 0 1 1\n1 0 0 1\n", "0\t1\t1.0\r\n1\t0\t1.0\r\n"],
    ids=["header", "no header", "byte order mark", "TREC", "numbers with a point"],
)
@pytest.mark.parametrize("ids", [("0", "1"), (0, 1)])
def test_forms_of_relevance(qrels: str, ids: tuple[Any, Any], tmp_path: Path) -> None:
    data = read_beir(folder(tmp_path / "b", qrels, ids))
    assert data.relevant == {"0": {"1": 1}, "1": {"0": 1}}
    assert data.corpus["0"] == ("", "river number 0 runs")


@pytest.mark.parametrize(
    ("qrels", "ids", "said"),
    [
        (QRELS, ("0", "0"), "corpus.jsonl, line 2: the _id '0' occurs twice, first in .*line 1"),
        (QRELS + "0\t1\t2\n", ("0", "1"), "line 4: 0 and 1 already have another score"),
        (QRELS + "0\t1\tnan\n", ("0", "1"), "line 4: expected query-id"),
        (QRELS + "0\t7\t1\n", ("0", "1"), "line 4: no such query or document"),
        (QRELS, ("0", None), "line 2: every line needs _id and text"),
        ("0\t1\t0.5\n1\t0\t1\n", ("0", "1"), "line 1: expected query-id"),
        ("0,1,1\n1\t0\t1\n", ("0", "1"), "line 1: expected query-id"),
        ("0\t1\t0\n1\t0\t0\n", ("0", "1"), "names no relevant document: one needs a score above 0"),
    ],
)
def test_what_is_ambiguous_is_refused(qrels: str, ids: tuple[Any, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_beir(folder(tmp_path / "b", qrels, ids))


def test_a_query_that_is_a_document(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded = ShardedEncoder(Encoder.from_pretrained(tiny_model_dir))
    encoder = MtebEncoder(sharded, model_meta(str(tiny_model_dir), sharded, {}), {})
    name = f"retrieval:{folder(tmp_path / 'b')}"
    with caplog.at_level("INFO"):
        (with_self,), (without,) = tasks_for([name]), tasks_for([name], exclude_self=True)
    assert "for 2 queries, a document has the query's own id" in caplog.text
    assert with_self.metadata.revision != without.metadata.revision
    assert measure(encoder, without, None).value == 1.0
    assert measure(encoder, with_self, None).value < 1.0
