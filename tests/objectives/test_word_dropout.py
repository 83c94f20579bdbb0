"""SimCSE with word dropout: which words stay, and that ranks and resumed runs leave out the same ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llm2vec_ds.data.prompts import Prompt, TokenizedText, tokenize
from llm2vec_ds.objectives.contrastive.word_dropout import WordDropout, WordStarts
from tests.support.global_batch import outcome, train_cases
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, recipe
from tests.support.tiny import tiny_tokenizer

INSTRUCTION, TEXT = "Find it:", "Boats, even the unsinkable ones, sail to Bergen in bad weather and return"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> TokenizedText:
    (found,) = tokenize(tokenizer, [Prompt(INSTRUCTION, TEXT)], end_with_eos=True)
    return found


def words(tokenizer: Any, text: TokenizedText) -> list[str]:
    """The words of the text's own tokens."""
    return str(tokenizer.decode(text.input_ids[text.pool_start : text.pool_end])).split()


def test_whole_words_are_left_out_and_nothing_else(tokenizer: Any, text: TokenizedText) -> None:
    assert len(text) > len(TEXT.split()) + 10  # words have several tokens
    found = WordDropout(tokenizer, 0.4)(text, (1, 2, 3))
    left = iter(TEXT.split())
    assert all(word in left for word in words(tokenizer, found))  # whole, and in their order
    assert 0 < len(words(tokenizer, found)) < len(TEXT.split())
    assert found.input_ids[: text.pool_start] == text.input_ids[: text.pool_start]
    assert found.input_ids[found.pool_end :] == text.input_ids[text.pool_end :]
    assert (found.pool_start, found.text_hash) == (text.pool_start, text.text_hash)


def test_the_share_is_kept_on_average_and_one_word_always(tokenizer: Any, text: TokenizedText) -> None:
    some, most = WordDropout(tokenizer, 0.4), WordDropout(tokenizer, 0.99)
    n_words = [len(words(tokenizer, some(text, (0, i)))) for i in range(400)]
    assert np.mean(n_words) == pytest.approx(0.6 * len(TEXT.split()), abs=0.5)
    few = [words(tokenizer, most(text, (0, i))) for i in range(50)]
    assert min(map(len, few)) == 1
    assert len({word for kept in few for word in kept}) > 5


def test_the_key_decides(tokenizer: Any, text: TokenizedText) -> None:
    one, same, other = (WordDropout(tokenizer, 0.4)(text, key) for key in ((1, 2), (1, 2), (1, 3)))
    assert one.input_ids == same.input_ids != other.input_ids


WORDS = {
    "spaces": ("Sail on, unsinkable boat", [" on", " unsink", " boat"]),
    "no spaces": ("这是一个句子", ["是", "一", "个", "句", "子"]),
    "cases": ("Привет, мир", [" мир"]),
}


@pytest.mark.parametrize("kind", ["byte level", "SentencePiece"])
@pytest.mark.parametrize(("line", "starts"), WORDS.values(), ids=WORDS)
def test_where_words_start(kind: str, line: str, starts: list[str]) -> None:
    """Each start is where the text says. SentencePiece marks a space, and drops it from a lone token."""
    tokenizer = character_tokenizer(kind, line)
    ids = tokenizer(line, add_special_tokens=False)["input_ids"]
    found = WordStarts(tokenizer)(np.array(ids))
    at = [len(tokenizer.decode(ids[:i])) for i in np.flatnonzero(found)]
    assert [start for start in at if start] == [line.index(start) for start in starts]


def character_tokenizer(kind: str, line: str) -> Any:
    """A tokenizer with a token for each character of the line."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "byte level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=["a", "▁"], show_progress=False)
    tokenizer.train_from_iterator([*line, "a"] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("micro_batch_tokens", [4096, 64])
def test_ranks_and_micro_batches_train_the_same(
    micro_batch_tokens: int, tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    def values(name: str) -> dict[str, Any]:
        values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / name, **NO_DROPOUT)
        values["simcse"] = {"attention_dropout": 0.0, "word_dropout": 0.4}
        values["batch"] = {"global_batch_size": 12, "micro_batch_tokens": micro_batch_tokens}
        return values

    run_ranks(
        partial(
            train_cases,
            recipes=[
                values("one"),
            ],
        ),
        1,
    )
    run_ranks(partial(train_cases, recipes=[values("two")]), 2)
    one, two = outcome(values("one"))[0], outcome(values("two"))[0]
    for row, again in zip(one, two, strict=True):
        assert again["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert again["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    plain = values("plain")
    plain["simcse"]["word_dropout"] = 0.0
    run_ranks(partial(train_cases, recipes=[plain]), 1)
    assert outcome(plain)[0][0]["loss"] != pytest.approx(one[0]["loss"], rel=1e-3)
