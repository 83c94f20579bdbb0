"""Mined negatives: as brute force in double precision finds them; killed and resumed as if never killed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2vec_ds.__main__ import main
from llm2vec_ds.data.pairs import load_prepared_pairs, prepare_all
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.mining import mine as mine_module
from llm2vec_ds.mining.mine import mine
from llm2vec_ds.mining.options import MiningOptions
from llm2vec_ds.recipe.recipe import parse_recipe
from llm2vec_ds.storage.lock import held
from tests.support.in_process import full_disk
from tests.support.rerankers import save_reranker
from tests.support.tiny import sentences, tiny_tokenizer

TEXTS = sentences(60, seed=3)
# The first query has two positives; the last positive is not in the corpus; one pair is no pair.
PAIRS = [(TEXTS[0], TEXTS[20]), *((TEXTS[i], TEXTS[i + 20]) for i in range(1, 14)), (TEXTS[0], TEXTS[40])]
PAIRS += [(" ", TEXTS[41]), (TEXTS[14], "outside of the corpus")]
CORPUS = [*TEXTS[20:60], "", f" {TEXTS[25]} ", TEXTS[21], TEXTS[59], TEXTS[21]]
GOOD = [pair for pair in PAIRS if pair[0].strip()]
DISTINCT = list(dict.fromkeys(text.strip() for text in CORPUS if text.strip()))

Make = Callable[..., MiningOptions]


@pytest.fixture
def make(tmp_path: Path, tiny_model_dir: Path) -> Make:
    """Options over PAIRS and CORPUS."""
    rows = [{"query": query, "positive": positive} for query, positive in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    files = {"pairs": str(tmp_path / "pairs.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}
    return lambda **changes: MiningOptions(**({"model": str(tiny_model_dir)} | files | changes))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mine_module, "TEXTS_PER_BLOCK", 8)
    monkeypatch.setattr(mine_module, "PAIRS_PER_BLOCK", 4)
    monkeypatch.setattr(mine_module, "DOCUMENTS_PER_TILE", 7)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def mined(options: MiningOptions, output: Path) -> list[dict[str, Any]]:
    mine(options, output)
    assert not list(output.parent.glob(".*.mining"))
    return lines(output)


def ranked(options: MiningOptions, candidates: list[str]) -> list[list[str]]:
    """All candidates of each pair, best first, by brute force in float64."""
    encoder = Encoder.from_pretrained(options.model)

    def vectors(texts: list[str], instruction: str | None) -> dict[str, np.ndarray]:
        found = encoder.encode(texts, instruction=instruction).astype(np.float64)
        return dict(zip(texts, found / np.linalg.norm(found, axis=1, keepdims=True), strict=True))

    queries = vectors([query for query, _ in GOOD], options.query_instruction)
    documents = vectors([*candidates, "outside of the corpus"], options.document_instruction)
    lists = []
    for query, positive in GOOD:
        own = queries[query] @ documents[positive]
        limit = own - (1 - options.ratio) * abs(own) - options.margin
        known = {p for q, p in GOOD if q == query}
        scores = {text: queries[query] @ documents[text] for text in candidates if text not in known}
        assert abs(min(np.abs(np.diff(sorted(scores.values()))))) > 1e-6  # fp32 can tell them apart
        lists.append(sorted((text for text in scores if scores[text] < limit), key=lambda t: -scores[t]))
    return lists


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_rank": 4, "last_rank": 9, "negatives": 6},
        {"margin": 0.08, "first_rank": 2},
        {"margin": 0.01, "ratio": 0.9},
        {"query_instruction": "find bread", "document_instruction": "fish", "micro_batch_tokens": 64},
    ],
    ids=["top", "ranks", "margin", "ratio", "instructions"],
)
def test_equals_brute_force_in_double_precision(changes: dict[str, Any], make: Make, tmp_path: Path) -> None:
    options = make(**changes)
    rows = mined(options, tmp_path / "out.jsonl")
    assert [(row["query"], row["positive"]) for row in rows] == GOOD
    expected = [
        texts[options.first_rank - 1 : options.last_rank][: options.negatives]
        for texts in ranked(options, DISTINCT)
    ]
    assert [row["negative"] for row in rows] == expected
    assert sum(map(len, expected)) > len(expected)  # there is something to find


def test_ranks_beyond_the_corpus_cost_no_memory(make: Make, tmp_path: Path) -> None:
    all_ranks = mined(make(last_rank=10**9), tmp_path / "all.jsonl")
    assert all_ranks == mined(make(last_rank=1000), tmp_path / "some.jsonl")


def test_the_corpus_is_all_positives_where_none_is_named(make: Make, tmp_path: Path) -> None:
    options = make(corpus=None, negatives=50)
    rows = mined(options, tmp_path / "out.jsonl")
    positives = list(dict.fromkeys(positive for _, positive in GOOD))
    assert [row["negative"] for row in rows] == ranked(options, positives)


def test_counts(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="llm2vec_ds")
    options = make(margin=0.2, first_rank=3)
    counts = mine(options, tmp_path / "out.jsonl")
    whole = ranked(options, DISTINCT)
    n_found = [min(max(0, len(texts) - 2), 5) for texts in whole]
    known = [len({p for q, p in GOOD if q == query and p in DISTINCT}) for query, _ in GOOD]
    near = [40 - n - len(texts) for n, texts in zip(known, whole, strict=True)]
    assert counts == Counter(
        {
            "pairs": 16, "queries": 15, "candidates": 40, "blank": 1, "blank pairs": 1, "duplicates": 4,
            "skipped: another positive of the query": 2,
            "skipped: as near as the positive": sum(near),
            "skipped: before --first-rank": sum(min(2, len(texts)) for texts in whole),
            "pairs with fewer than 5 negatives": sum(n < 5 for n in n_found),
            "pairs with none": n_found.count(0),
        }
    )  # fmt: skip
    assert 0 < counts["pairs with none"] < counts["pairs with fewer than 5 negatives"] < 16
    assert f"{counts['pairs with none']} pairs with none" in caplog.text


def test_negatives_that_pairs_have_are_not_lost_in_silence(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"query": q, "positive": p} for q, p in GOOD[:3]]
    rows[1] |= {"negative": "my own"}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = mine(make(pairs=str(pairs), corpus=None), tmp_path / "out.jsonl")
    assert counts["pairs whose own negatives are left out"] == 1
    assert "1 pair(s) have hard negatives of their own, which the output leaves out" in caplog.text


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reranker(tmp_path_factory.mktemp("reranker"))


def test_a_reranker_leaves_out_what_it_takes_for_as_good(
    make: Make, tmp_path: Path, reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rank range, before any are chosen; blocks change nothing, and a killed run goes on."""
    from sentence_transformers import CrossEncoder

    monkeypatch.setattr(mine_module, "RERANKED_PAIRS_PER_BLOCK", 5)
    changes: dict[str, Any] = {"first_rank": 2, "last_rank": 11, "negatives": 3}
    options = make(reranker=str(reranker), reranker_ratio=0.9, reranker_margin=0.01, **changes)
    model = CrossEncoder(str(reranker), device="cpu")  # with its sigmoid
    expected, n_left_out = [], 0
    for (query, positive), texts in zip(GOOD, ranked(options, DISTINCT), strict=True):
        in_range = texts[1:11]
        scores = dict(zip(in_range, model.predict([(query, text) for text in in_range]), strict=True))
        limit = 0.9 * float(model.predict([(query, positive)])[0]) - 0.01
        kept = [text for text in in_range if scores[text] < limit]
        expected.append(kept[:3])
        n_left_out += len(in_range) - len(kept)
    killed(monkeypatch, "best_rows", 3, options, tmp_path / "out.jsonl")
    counts = mine(options, tmp_path / "out.jsonl")
    assert [row["negative"] for row in lines(tmp_path / "out.jsonl")] == expected
    assert counts["skipped: as good as the positive for the reranker"] == n_left_out
    plain = [row["negative"] for row in mined(make(**changes), tmp_path / "plain.jsonl")]
    assert 0 < sum(map(len, expected)) != sum(map(len, plain))


def test_random_sampling_draws_from_the_ranks_by_seed_and_row(make: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sampling": "random", "negatives": 3, "first_rank": 2, "last_rank": 9}
    options = make(**changes)
    drawn = [row["negative"] for row in mined(options, tmp_path / "a.jsonl")]
    ranges = [texts[1:9] for texts in ranked(options, DISTINCT)]
    assert all(set(d) <= set(r) for d, r in zip(drawn, ranges, strict=True))
    assert all(len(set(d)) == min(3, len(r)) for d, r in zip(drawn, ranges, strict=True))
    places = {tuple(map(r.index, d)) for d, r in zip(drawn, ranges, strict=True) if len(r) == 8}
    assert len(places) > 3  # not the same draw in every row
    assert drawn == [row["negative"] for row in mined(options, tmp_path / "b.jsonl")]
    assert drawn != [row["negative"] for row in mined(make(**changes, seed=1), tmp_path / "c.jsonl")]


@pytest.mark.parametrize(("pairs", "tile"), [(1, 1), (5, 7), (100, 3)])
def test_sizes_of_blocks_and_tiles_change_nothing(
    pairs: int, tile: int, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine(make(), tmp_path / "whole.jsonl")
    monkeypatch.setattr(mine_module, "PAIRS_PER_BLOCK", pairs)
    monkeypatch.setattr(mine_module, "DOCUMENTS_PER_TILE", tile)
    mine(make(), tmp_path / "tiled.jsonl")
    assert (tmp_path / "tiled.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


class Work:
    """Counts what a run does, and kills it at the n-th call of one thing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kill: str = "", at: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.kill, self.at = kill, at
        for owner, name in (
            (Encoder, "encode"),
            (Encoder, "from_pretrained"),
            (mine_module, "best_rows"),
            (mine_module, "replace_text"),
            (mine_module, "write_corpus"),
            (mine_module.shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self._watched(name, getattr(owner, name)))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.counts[name] += 1
            if (name, self.counts[name]) == (self.kill, self.at):
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return watched


def killed(monkeypatch: pytest.MonkeyPatch, kill: str, at: int, options: MiningOptions, output: Path) -> None:
    with monkeypatch.context() as patch:
        Work(patch, kill, at)
        with pytest.raises(KeyboardInterrupt):
            mine(options, output)


@pytest.mark.parametrize(
    ("kill", "at", "again"),
    [
        ("encode", 5, {"from_pretrained": 1, "encode": 4, "best_rows": 4}),
        # After the note of the reading come those of 2 + 6 blocks of texts, then those of pairs: each is
        # written after its block, so a block whose note is missing is done again.
        ("replace_text", 5, {"from_pretrained": 1, "encode": 5, "best_rows": 4}),
        ("best_rows", 3, {"best_rows": 2}),
        ("replace_text", 11, {"best_rows": 3}),
    ],
    ids=["encoding", "vectors without note", "searching", "lines without note"],
)
@pytest.mark.usefixtures("small_blocks")
def test_killed_and_resumed_is_as_never_killed(
    kill: str, at: int, again: dict[str, int], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        whole = Work(patch)
        mine(make(), tmp_path / "whole.jsonl")
    assert whole.counts["encode"] == 8
    assert whole.counts["best_rows"] == 4
    killed(monkeypatch, kill, at, make(), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with monkeypatch.context() as patch:
        resumed = Work(patch)
        mine(make(), tmp_path / "out.jsonl")
    assert resumed.counts - Counter({"replace_text": 99, "rmtree": 1}) == again
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*.mining"))


def test_killed_before_the_work_folder_is_gone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    killed(monkeypatch, "rmtree", 1, make(), output)
    before = output.read_bytes()
    mine(make(), output, overwrite=True)
    assert output.read_bytes() == before != b""
    assert not list(tmp_path.glob(".*.mining"))


@pytest.mark.usefixtures("small_blocks")
def test_other_options_start_anew(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llm2vec_ds")
    killed(monkeypatch, "best_rows", 3, make(), tmp_path / "out.jsonl")
    with monkeypatch.context() as patch:
        work = Work(patch)
        mine(make(margin=0.1), tmp_path / "out.jsonl")
    assert "an earlier run had other options, texts or another model: starting again" in caplog.text
    assert work.counts["encode"] == 8
    mine(make(margin=0.1), tmp_path / "fresh.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()


def test_the_key_does_not_know_the_sizes_of_batches(make: Make) -> None:
    """It shapes speed and memory alone: the advice of a full memory keeps what is encoded."""
    plain = make().key([])
    assert plain == make(micro_batch_tokens=64).key([]) == make(reranker_batch_size=4).key([])
    assert plain not in (make(margin=0.1).key([]), make(ratio=0.9).key([]), make(reranker="r").key([]))


def test_the_key_knows_sources_and_model(make: Make, tmp_path: Path) -> None:
    from llm2vec_ds.data.sources import find_source

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    options = make(model=str(tmp_path / "model"))

    def key() -> str:
        return options.key([find_source(options.pairs)])

    keys = [key(), key()]
    (tmp_path / "model" / "config.json").write_text("{ }")
    keys.append(key())
    Path(options.pairs).write_text("{}")
    keys.append(key())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.usefixtures("small_blocks")
def test_a_full_disk_loses_no_finished_block(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine(make(), tmp_path / "whole.jsonl")
    with full_disk(5000), pytest.raises(UserError, match="out.jsonl cannot be written: .*free some space"):
        mine(make(), tmp_path / "out.jsonl")
    work = Work(monkeypatch)
    mine(make(), tmp_path / "out.jsonl")
    assert 0 < work.counts["encode"] < 8
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_one_process_at_a_time(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / ".out.jsonl.mining"
    folder.mkdir()
    with held(folder / "lock", folder), pytest.raises(UserError, match="another process is using it"):
        mine(make(), tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["pairs", "corpus"])
def test_an_output_that_is_an_input_is_refused(name: str, make: Make, tmp_path: Path) -> None:
    before = (tmp_path / f"{name}.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"would overwrite .*{name}.jsonl, which is an input"):
        mine(make(), tmp_path / f"{name}.jsonl", overwrite=True)
    assert (tmp_path / f"{name}.jsonl").read_bytes() == before


def test_from_the_command_line_to_the_supervised_stage(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = make(negatives=3)
    output = tmp_path / "deep" / "er" / "mined.jsonl"
    output.parent.mkdir(parents=True)
    output.write_text("of yesterday")
    files = ["--pairs", options.pairs, "--corpus", options.corpus, "--output", output, "--overwrite"]
    monkeypatch.setattr(
        "sys.argv", ["llm2vec-ds", *map(str, ["mine", "--model", options.model, "--negatives", 3, *files])]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["negative"] for row in rows] == [texts[:3] for texts in ranked(options, DISTINCT)]
    data = {"path": str(output), "pairs": {"max_negatives": 2}}
    recipe = parse_recipe(
        {"stage": "supervised", "model": {"path": "m"}, "data": data, "output_dir": str(tmp_path / "run")}
    )
    tokenizer = tiny_tokenizer()
    (groups,) = prepare_all(recipe, tokenizer)
    pairs = load_prepared_pairs(groups)
    for row, example in zip(rows, pairs[range(len(pairs))], strict=True):
        texts = [tokenizer.decode(text.input_ids, skip_special_tokens=True) for text in example]
        assert texts == [row["query"], row["positive"], *row["negative"][:2]]
