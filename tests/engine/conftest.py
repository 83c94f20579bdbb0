"""Fixtures that tests of the engine share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.global_batch import EXAMPLES, TEXTS_AN_EXAMPLE
from tests.support.tiny import WORDS, tiny_tokenizer


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 examples with two negatives, every text of as many tokens: micro-batches can be counted."""
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    texts: list[str] = []
    while len(texts) < 2 * EXAMPLES * TEXTS_AN_EXAMPLE:
        picks = torch.randint(len(WORDS), (6,), generator=generator).tolist()
        text = " ".join(WORDS[i] for i in picks)
        if len(tokenizer(text)["input_ids"]) == 9 and text not in texts:
            texts.append(text)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    groups = zip(*[iter(texts)] * TEXTS_AN_EXAMPLE, strict=True)
    rows = ({"query": q, "positive": p, "negative": n} for q, p, n in groups)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
