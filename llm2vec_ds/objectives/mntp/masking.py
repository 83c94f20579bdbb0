"""Chooses the tokens that MNTP masks.

The random numbers depend on (seed, step, row) only. So a text gets the same masks on any number of ranks, and
after a run is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm2vec_ds.batch import NOT_PREDICTED
from llm2vec_ds.errors import UserError
from llm2vec_ds.recipe.objectives import MntpConfig


@dataclass(frozen=True)
class Masking:
    """Masks every chosen token, or follows BERT (Devlin et al., 2019, arXiv 1810.04805, section 3.1).

    BERT replaces 80 % of the chosen tokens by the mask token and 10 % by a random token. 10 % stay as they
    are.
    """

    mask_token_id: int
    special_ids: np.ndarray
    ordinary_ids: np.ndarray
    config: MntpConfig

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, config: MntpConfig) -> Masking:
        """Raises UserError if the mask token is not a single token of the tokenizer."""
        # `encode` may split the string or put a space before it, so the vocabulary's own entry comes first.
        ids = tokenizer.encode(config.mask_token, add_special_tokens=False)
        direct = tokenizer.convert_tokens_to_ids(config.mask_token)
        if direct is not None and direct != tokenizer.unk_token_id:
            ids = [direct]
        if len(ids) != 1:
            raise UserError(
                f"mntp.mask_token {config.mask_token!r} is {len(ids)} tokens of this tokenizer: "
                "choose a string that is one, such as '_' or '<mask>'"
            )
        special = np.asarray(sorted(tokenizer.all_special_ids), dtype=np.int64)
        ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
        return cls(ids[0], special, ordinary, config)

    @property
    def largest_id(self) -> int:
        """The largest id that masking can write."""
        return max(self.mask_token_id, int(self.ordinary_ids.max()))

    def __call__(
        self, input_ids: np.ndarray, *, seed: int, step: int, row: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids with masked tokens `[L]`, and the labels `[L]`: the original id, or −100.

        Special tokens are never masked. A text's first token is never masked, because no hidden state before
        it could predict it.
        """
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, row])))
        input_ids = np.asarray(input_ids, dtype=np.int64)
        lowest, highest = self.config.mask_rates
        rate = lowest if lowest == highest else random.uniform(lowest, highest)
        chosen = random.random(len(input_ids)) < rate
        chosen[0] = False
        chosen &= ~np.isin(input_ids, self.special_ids)
        labels = np.where(chosen, input_ids, NOT_PREDICTED)
        if self.config.masking == "all":
            return np.where(chosen, self.mask_token_id, input_ids), labels
        fate = random.random(len(input_ids))
        replacement = random.choice(self.ordinary_ids, len(input_ids))
        masked = np.where(chosen & (fate < 0.8), self.mask_token_id, input_ids)
        return np.where(chosen & (fate >= 0.9), replacement, masked), labels
