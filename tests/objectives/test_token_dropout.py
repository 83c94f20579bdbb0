"""SimCSE with token dropout: which tokens stay, and that ranks and resumed runs leave out the same ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.objectives.contrastive.token_dropout import with_tokens_left_out
from tests.support.global_batch import outcome, train_cases
from tests.support.ranks import run_ranks
from tests.support.runs import NO_DROPOUT, recipe

TEXT = TokenizedText(list(range(100, 140)), 5, 38, 7)


def test_only_the_texts_own_tokens_are_left_out() -> None:
    found = with_tokens_left_out(TEXT, 0.4, (1, 2, 3))
    ids, own = list(found.input_ids), TEXT.input_ids[5:38]
    assert ids[:5] == TEXT.input_ids[:5]
    assert ids[found.pool_end :] == TEXT.input_ids[38:]
    kept = ids[5 : found.pool_end]
    assert kept == [token for token in own if token in kept]
    assert 0 < len(kept) < len(own)
    assert found.text_hash == TEXT.text_hash


def test_the_share_is_kept_on_average_and_one_token_always() -> None:
    lengths = [len(with_tokens_left_out(TEXT, 0.4, (0, i))) - 7 for i in range(400)]
    assert np.mean(lengths) == pytest.approx(0.6 * 33, abs=0.5)
    few = [with_tokens_left_out(TokenizedText([1, 2], 0, 2, 0), 0.99, (0, i)) for i in range(50)]
    assert {len(text) for text in few} == {1}
    assert {int(text.input_ids[0]) for text in few} == {1, 2}


def test_the_key_decides() -> None:
    one, same, other = (with_tokens_left_out(TEXT, 0.4, key) for key in ((1, 2), (1, 2), (1, 3)))
    assert one.input_ids == same.input_ids != other.input_ids


@pytest.mark.parametrize("micro_batch_tokens", [4096, 64])
def test_ranks_and_micro_batches_train_the_same(
    micro_batch_tokens: int, tiny_model_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    def values(name: str) -> dict[str, Any]:
        values = recipe("simcse", tiny_model_dir, texts_file, tmp_path / name, **NO_DROPOUT)
        values["simcse"] = {"attention_dropout": 0.0, "token_dropout": 0.4}
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
    plain["simcse"]["token_dropout"] = 0.0
    run_ranks(partial(train_cases, recipes=[plain]), 1)
    assert outcome(plain)[0][0]["loss"] != pytest.approx(one[0]["loss"], rel=1e-3)
