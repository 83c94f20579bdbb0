"""Tagged sentences: CoNLL-U and column files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from datasets import Dataset

from llm2vec_ds.data.tagged import TaggedSentence, load_tagged
from llm2vec_ds.errors import UserError

CONLLU = """\
# sent_id = 1
# text = He won't stop.
1\tHe\the\tPRON\tPRP\t_\t4\tnsubj\t_\t_
2-3\twon't\t_\t_\t_\t_\t_\t_\t_\t_
2\two\twill\tAUX\tMD\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\tstop\tstop\tVERB\tVB\t_\t0\troot\t_\t_
4.1\t_\t_\tVERB\tVB\t_\t_\t_\t_\t_
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

# sent_id = 2
1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_
"""

COLUMNS = """\
-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
"""


def test_conllu_without_multi_word_tokens_and_empty_nodes(tmp_path: Path) -> None:
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU)
    first, second = load_tagged(str(path), "upos")
    assert first == TaggedSentence(["He", "wo", "n't", "stop", "."], ["PRON", "AUX", "PART", "VERB", "PUNCT"])
    assert second == TaggedSentence(["Yes"], ["INTJ"])
    assert load_tagged(str(path), "xpos")[1].labels == ["UH"]


def test_column_file(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(COLUMNS)
    sentences = load_tagged(str(path), "-1")
    assert sentences == [
        TaggedSentence(["EU", "rejects"], ["B-ORG", "O"]),
        TaggedSentence(["Peter"], ["B-PER"]),
    ]
    assert load_tagged(str(path), "1")[0].labels == ["NNP", "VBZ"]


def test_other_encodings_endings_and_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "plain.conllu").write_text(CONLLU)
    expected = load_tagged(str(tmp_path / "plain.conllu"), "upos")
    contents = {
        "mark.conllu": CONLLU.encode("utf-8-sig"),
        "wide.conllu": CONLLU.encode("utf-16"),
        "LARGE.CONLLU": CONLLU.encode(),
        "small.conllu.gz": gzip.compress(CONLLU.encode("utf-16")),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert load_tagged(str(tmp_path / name), "upos") == expected, name
    (tmp_path / "cut.conllu.gz").write_bytes(contents["small.conllu.gz"][:-9])
    with pytest.raises(UserError, match="cannot be read"):
        load_tagged(str(tmp_path / "cut.conllu.gz"), "upos")


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.conllu", "", "upos", "holds no sentence"),
        ("a.conllu", CONLLU, "ner", "choose form, lemma, upos"),
        ("a.conllu", "just a text\n", "upos", "line 1 is no line of CoNLL-U"),
        ("a.conllu", "1\tYes\n", "upos", "line 1: no column 3, it has 2"),
        ("a.txt", COLUMNS, "upos", "choose a number"),
        ("a.txt", "a b\n", "2", "line 1: no column 2"),
        ("a.txt", b"\xff\n", "1", "not text in UTF-8"),
    ],
)
def test_unusable_files(name: str, content: str | bytes, column: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_tagged(str(path), column)


def test_sources_that_are_not_there() -> None:
    with pytest.raises(UserError, match="No such file"):
        load_tagged("no/such.conllu", "upos")
    with pytest.raises(UserError, match="name the split, such as hub:owner/name@test"):
        load_tagged("hub:owner/name", "ner_tags")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tagged("hub:owner/name@test", "ner_tags")


def test_a_column_of_the_hub_without_lists_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dataset.from_dict({"id": ["a"], "tokens": [["He", "stops"]], "tags": [["N", "V"]]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    assert load_tagged("hub:owner/name@test", "tags") == [TaggedSentence(["He", "stops"], ["N", "V"])]
    with pytest.raises(UserError, match="the column id holds no lists of labels"):
        load_tagged("hub:owner/name@test", "id")
