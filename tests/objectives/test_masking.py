"""MNTP masking: shares, exclusions, keys."""

from __future__ import annotations

import numpy as np
import pytest

from llm2vec_ds.batch import NOT_PREDICTED
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.mntp.masking import Masking
from llm2vec_ds.recipe.objectives import MntpConfig
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
UNDERSCORE = TOKENIZER.convert_tokens_to_ids("_")


def masking(**config: object) -> Masking:
    return Masking.for_tokenizer(TOKENIZER, MntpConfig(**config))  # type: ignore[arg-type]


def test_bert_shares_over_a_long_text() -> None:
    ids = np.random.default_rng(0).integers(3, 400, 40_000)
    ids[ids == UNDERSCORE] += 1
    masked, labels = masking()(ids, seed=0, step=0, row=0)
    predicted = labels != NOT_PREDICTED
    assert (labels[predicted] == ids[predicted]).all()
    assert (masked[~predicted] == ids[~predicted]).all()
    assert predicted.mean() == pytest.approx(0.2, abs=0.01)
    hidden = masked[predicted] == UNDERSCORE
    kept = masked[predicted] == ids[predicted]
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    assert kept.mean() == pytest.approx(0.1, abs=0.02)
    assert not np.isin(masked[predicted], TOKENIZER.all_special_ids).any()


def test_all_mask_hides_every_predicted_token() -> None:
    masked, labels = masking(masking="all", mask_rate=0.8)(np.arange(3, 390), seed=0, step=0, row=0)
    predicted = labels != NOT_PREDICTED
    assert predicted.mean() == pytest.approx(0.8, abs=0.06)
    assert (masked[predicted] == UNDERSCORE).all()


def test_each_text_has_its_own_share_in_each_step() -> None:
    """Drawn evenly between the two, keyed like the rest."""
    mask, ids = masking(mask_rate=[0.1, 0.7]), np.tile(np.arange(3, 390), 5)

    def share(step: int, row: int) -> float:
        return float((mask(ids, seed=0, step=step, row=row)[1] != NOT_PREDICTED).mean())

    shares = np.array([share(step, row) for step in range(10) for row in range(20)])
    assert 0.1 - 0.03 < shares.min() < 0.15
    assert 0.65 < shares.max() < 0.7 + 0.03
    assert np.histogram(shares, 4, (0.1, 0.7))[0].min() > 30
    assert share(3, 4) == share(3, 4)
    assert len({share(3, 4), share(3, 5), share(4, 4)}) == 3


@pytest.mark.parametrize("rate", [0, 1.0, [0.7, 0.1], [0.1], [0.1, 0.2, 0.3], [0.1, 1.2], "half", None])
def test_shares_that_are_none(rate: object) -> None:
    with pytest.raises(ValueError, match="must be a number between 0 and 1, or two of them"):
        masking(mask_rate=rate)


def test_specials_and_the_first_token_are_never_masked() -> None:
    ids = np.array([0, 1, 2, 50, 0, 60, 2] * 20)
    for row in range(20):
        _, labels = masking(mask_rate=0.99)(ids, seed=0, step=0, row=row)
        assert not np.isin(labels, TOKENIZER.all_special_ids).any()
        _, labels = masking(mask_rate=0.99)(np.array([50, 60, 70]), seed=0, step=0, row=row)
        assert labels[0] == NOT_PREDICTED


def test_the_key_alone_decides() -> None:
    ids, mask = np.arange(3, 103), masking()
    first = mask(ids, seed=1, step=2, row=3)
    mask(ids, seed=9, step=9, row=9)
    again = mask(ids, seed=1, step=2, row=3)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for other in ({"seed": 0}, {"step": 0}, {"row": 0}):
        _, labels = mask(ids, **{"seed": 1, "step": 2, "row": 3, **other})
        assert (labels != first[1]).any()


def test_a_mask_token_of_several_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="mask_token 'not one token' is .* tokens"):
        masking(mask_token="not one token")
