"""Pairs of several sources: columns, instructions, groups, numbering."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_ds.data.pairs import PreparedPairs, load_prepared_pairs, prepare_all, prepare_pairs
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.recipe.sections import DataConfig
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"query": "the river", "positive": "runs past an old mill", "negative": "bread is baked"},
    {"query": "a train", "positive": "leaves at nine", "negative": ["rain falls", "nobody waits", "clocks"]},
    {"query": "the coast", "positive": "green hills", "negative": None},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, **pairs: Any) -> PreparedPairs:
    data = DataConfig(path=str(path), pairs=pairs, **{"instruction": pairs.pop("instruction", None)})  # type: ignore[arg-type]
    return load_prepared_pairs(prepare_pairs(data, data.path, TOKENIZER))


def words(example: list[TokenizedText]) -> list[str]:
    return [TOKENIZER.decode(text.input_ids, skip_special_tokens=True) for text in example]


def test_examples_with_nought_to_many_negatives(tmp_path: Path) -> None:
    pairs = load(write(tmp_path / "a.jsonl", ROWS), max_negatives=2)
    assert len(pairs) == 3
    assert [words(example) for example in pairs[[2, 0, 1]]] == [
        ["the coast", "green hills"],
        ["the river", "runs past an old mill", "bread is baked"],
        ["a train", "leaves at nine", "rain falls", "nobody waits"],
    ]
    without = load(write(tmp_path / "a.jsonl", ROWS), max_negatives=0)
    assert [len(example) for example in without[[0, 1, 2]]] == [2, 2, 2]


def test_csv_with_columns_of_other_names(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["q", "p", "n"], ["the river", "runs", "bread"], ["a", "b", ""]])
    columns = {"query_column": "q", "positive_column": "p", "negative_column": "n"}
    pairs = load(tmp_path / "a.csv", **columns)
    assert [len(example) for example in pairs[[0, 1]]] == [3, 2]


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_pairs_need_no_negatives(format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{name: row[name] for name in ("query", "positive")} for row in ROWS]
    path = tmp_path / f"a.{format}"
    if format == "jsonl":
        write(path, rows)
    elif format == "csv":
        path.write_text("query,positive\n" + "".join(f"{r['query']},{r['positive']}\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    with caplog.at_level("INFO"):
        pairs = load(path)
    assert [words(example) for example in pairs[[0, 2]]] == [list(rows[0].values()), list(rows[2].values())]
    assert "no column 'negative', so there are no hard negatives" in caplog.text


def test_some_rows_may_have_negatives(tmp_path: Path) -> None:
    rows = [{"query": "a", "positive": "b"}, ROWS[0], {"query": "c", "positive": "d"}]
    assert [len(example) for example in load(write(tmp_path / "a.jsonl", rows))[[0, 1, 2]]] == [2, 3, 2]


def test_a_negative_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row has the column 'nagative'.*max_negatives=0"):
        load(write(tmp_path / "a.jsonl", ROWS), negative_column="nagative")


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("query", ["runs", "flows"], "a list"),
        ("query", {"text": "a"}, "an object"),
        ("query", True, "true or false"),
        ("positive", [["runs"]], "a list"),
        ("positive", ["runs", {"text": "a"}], "an object"),
        ("negative", [["bread", "baked"]], "a list"),
    ],
)
def test_what_is_no_text_is_refused(column: str, value: Any, kind: str, tmp_path: Path) -> None:
    """It would be trained as Python writes it."""
    rows = [ROWS[0], {**ROWS[0], column: value}]
    with pytest.raises(UserError, match=f"a.jsonl, line 2: column '{column}' holds {kind}, not a text"):
        load(write(tmp_path / "a.jsonl", rows))


def test_bytes_are_refused(tmp_path: Path) -> None:
    rows = [{"query": b"the river", "positive": "runs"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'query' holds bytes, not a text"):
        load(tmp_path / "a.parquet")


def test_half_of_a_surrogate_pair_leaves_the_example_out(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "positive": "cut emoji \ud83d here"}, ROWS[1]]
    assert [words(example)[0] for example in load(write(tmp_path / "a.jsonl", rows))[[0]]] == ["a train"]


def test_missing_values_are_missing_and_numbers_are_text(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "positive": float("nan")}, {**ROWS[0], "positive": 7}]
    pairs = load(write(tmp_path / "a.jsonl", rows))
    assert [words(example)[1] for example in pairs[range(len(pairs))]] == ["7"]


def test_endings_may_be_capital_letters(tmp_path: Path) -> None:
    path = tmp_path / "Some.Pairs.CSV"
    path.write_text("query,positive\nthe river,runs\na train,leaves\n")
    (tmp_path / "T.JSONL.GZ").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    assert len(load(path)) == 2
    assert list(load(tmp_path / "T.JSONL.GZ").group_sizes) == ["T"]


def test_a_blank_query_or_positive_leaves_the_example_out(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "query": " "}, {**ROWS[0], "positive": ""}, ROWS[1]]
    pairs = load(write(tmp_path / "a.jsonl", rows))
    assert [words(example)[0] for example in pairs[list(range(len(pairs)))]] == ["a train"]


def test_sources_instructions_and_groups(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("nli_2", "web", "nli_1"):
        write(folder / f"{name}.jsonl", ROWS[:2] if name == "web" else ROWS)
    instructions = tmp_path / "instructions.yaml"
    instructions.write_text(
        "nli_1: {query: fish, group: nli}\nnli_2: {query: paints, document: grows, group: nli}\nweb: null\n"
    )
    pairs = load(folder, instructions=str(instructions))
    assert pairs.group_sizes == {"nli": 6, "web": 2}
    first, fourth, web = pairs[[0, 3, 6]]
    assert words(first)[:2] == ["fish the river", "runs past an old mill"]
    assert words(fourth)[:2] == ["paints the river", "grows runs past an old mill"]
    assert words(web)[0] == "the river"
    pooled = TOKENIZER.decode(fourth[1].input_ids[fourth[1].pool_start : fourth[1].pool_end])
    assert pooled.strip() == "runs past an old mill"
    apart, one = tmp_path / "apart.yaml", tmp_path / "one.yaml"
    apart.write_text(instructions.read_text().replace(", group: nli", ""))
    one.write_text(instructions.read_text().replace("web: null", "web: {group: nli}"))
    others = [load(folder, instructions=str(file)) for file in (apart, one)]
    assert [other.source_sizes for other in others] == [pairs.source_sizes] * 2
    assert [len(other.group_sizes) for other in others] == [3, 1]
    assert len({found.fingerprint for found in (pairs, *others)}) == 3  # other groups give other batches
    # Equal documents of one source are recognised across examples, whatever else differs.
    assert first[1].text_hash == web[1].text_hash != fourth[1].text_hash


def test_an_instruction_for_all_goes_before_queries_only(tmp_path: Path) -> None:
    (example,) = load(write(tmp_path / "a.jsonl", ROWS[:1]), instruction="fish")[[0]]
    assert words(example)[:2] == ["fish the river", "runs past an old mill"]


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (None, "No such file"),
        ("- a list", "must be a YAML mapping"),
        ("{unclosed", "not valid YAML"),
        ("other: text", "has no entry for a: add a line `a: …`"),
        ("a: {qury: text}", "must be an instruction, or a mapping with the keys query"),
        ("a: {query: 3}", "`a.query` must be a text"),
    ],
)
def test_mistakes_in_instructions(tmp_path: Path, instructions: str | None, message: str) -> None:
    path = tmp_path / "instructions.yaml"
    if instructions is not None:
        path.write_text(instructions)
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "a.jsonl", ROWS), instructions=str(path))


def test_mistakes_in_data(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no column 'positive': set data\.pairs\.positive_column to one of query"
    ):
        load(write(tmp_path / "a.jsonl", [{"query": "a"}]))
    (tmp_path / "b.txt").write_text("text\n")
    with pytest.raises(UserError, match="pairs need columns"):
        load(tmp_path / "b.txt")
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    data = DataConfig(path=[str(write(tmp_path / d / "a.jsonl", ROWS)) for d in "cd"], pairs={})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="two files have the same name"):
        prepare_pairs(data, data.path, TOKENIZER)


def forms() -> dict[str, str]:
    """The same two examples as FlagEmbedding and sentence-transformers write them."""
    flag = [
        {"query": "the river", "pos": ["runs", "flows"], "neg": ["bread", "rain"]},
        {"query": "a train", "pos": ["leaves"], "neg": []},
    ]
    scored = [
        {"query": row["query"], **{k: [[text, 0.5] for text in row[k]] for k in ("pos", "neg")}}
        for row in flag
    ]
    return {
        "flag.jsonl": "".join(json.dumps(row) + "\n" for row in flag),
        "scored.jsonl": "".join(json.dumps(row) + "\n" for row in scored),
        "array.json": json.dumps(flag, indent=1),
        "lines.json": "".join(json.dumps(row) + "\n" for row in flag),
        "lists.jsonl": '["the river", "runs", "bread", "rain"]\n["the river", "flows", "bread", "rain"]\n'
        '["a train", "leaves"]\n',
        "lists.json": '[["the river", "runs", "bread", "rain"], ["the river", "flows", "bread", "rain"],\n'
        '["a train", "leaves"]]\n',
        "numbered.tsv": "query\tpos\tneg_1\tneg_2\n"
        "the river\truns\tbread\train\nthe river\tflows\tbread\train\n"
        "a train\tleaves\t\t\n",
    }


@pytest.mark.parametrize("name", [*forms(), "numbered.parquet"])
def test_forms_of_other_libraries(name: str, tmp_path: Path) -> None:
    if name == "numbered.parquet":
        header, *rows = (line.split("\t") for line in forms()["numbered.tsv"].splitlines())
        pq.write_table(
            pa.Table.from_pylist([dict(zip(header, row, strict=True)) for row in rows]), tmp_path / name
        )
    else:
        (tmp_path / name).write_text(forms()[name])
    pairs = load(tmp_path / name, positive_column="pos", negative_column="neg", max_negatives=2)
    assert [words(example) for example in pairs[range(len(pairs))]] == [
        ["the river", "runs", "bread", "rain"],
        ["the river", "flows", "bread", "rain"],
        ["a train", "leaves"],
    ]


def test_bad_rows_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [*map(json.dumps, ROWS[:2]), "{broken", '{"query": "a"}', '{"query": "a", "positive": {"b": 1}}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = DataConfig(path=str(tmp_path / "a.jsonl"), pairs={}, bad_rows="skip")  # type: ignore[arg-type]
    (folders,) = prepare_pairs(data, data.path, TOKENIZER).values()
    assert len(load_prepared_pairs({"a": folders})) == 2
    assert json.loads((folders[0] / "manifest.json").read_text())["counts"]["bad rows"] == 3
    for number in (3, 4, 5):
        assert f"left out: {tmp_path}/a.jsonl, line {number}: " in caplog.text


def test_held_out_files_that_train_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    data = {"path": str(file), "held_out_path": [str(file)], "pairs": {}}
    values = {"stage": "supervised", "model": {"path": "m"}, "output_dir": "o", "data": data}
    prepare_all(parse_recipe(values), TOKENIZER)
    assert f"data.held_out_path names files that also train: {file}" in caplog.text


def test_the_first_pairs_of_each_source(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", ROWS[1:])
    data = DataConfig(path=str(tmp_path), pairs={}, max_texts=1)  # type: ignore[arg-type]
    pairs = load_prepared_pairs(prepare_pairs(data, data.path, TOKENIZER))
    assert pairs.group_sizes == {"a": 1, "b": 1}
    assert [words(example)[0] for example in pairs[[0, 1]]] == [ROWS[0]["query"], ROWS[1]["query"]]


def test_one_positive_of_each_query_in_an_epoch(tmp_path: Path) -> None:
    """A list of positives, and another row with the same query; a query of another source is another one."""
    rows = [
        {"query": "the river", "positive": ["runs", "bends", "ends"]},
        {"query": "a train", "positive": "leaves"},
        {"query": "the river", "positive": "rises"},
        {"query": "the coast", "positive": "green hills"},
    ]
    write(tmp_path / "a.jsonl", rows)
    pairs = load(tmp_path / "a.jsonl", positives="one_per_epoch")
    values = {
        "stage": "supervised",
        "model": {"path": "m"},
        "data": {"path": str(tmp_path / "a.jsonl"), "pairs": {"positives": "one_per_epoch"}},
        "output_dir": "o",
        "batch": {"global_batch_size": 3},
    }
    batches = pairs.batches(parse_recipe(values))
    assert batches.steps_per_epoch == 1
    positives = set()
    for step in range(40):
        examples = [words(example) for example in pairs[batches(step)]]
        assert sorted(query for query, _ in examples) == ["a train", "the coast", "the river"]
        positives |= {positive for query, positive in examples if query == "the river"}
    assert positives == {"runs", "bends", "ends", "rises"}
    values["data"]["pairs"]["positives"] = "all"  # type: ignore[index]
    assert pairs.batches(parse_recipe(values)).steps_per_epoch == 2  # of six examples
