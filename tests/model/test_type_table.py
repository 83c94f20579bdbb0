"""What becomes of every type of transformers' language models: docs/architectures.md says it, row by row.

`UPDATE_DOCS=1 pytest tests/model/test_type_table.py -m slow` writes the table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.accepted import accepted
from llm2vec_ds.model.loading import loading
from tests.support.model_types import CHANGED, config_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
HEAD = "| type | what becomes of it |\n|---|---|\n"
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SAMPLE = ["llama", "gemma3", "phi3", "qwen3_moe", "lfm2", "falcon", "jamba", "trocr", "xmod"]


def outcome(model_type: str) -> str:
    """In the words of the error that a user sees, without what is the same for all, and without figures."""
    try:
        with loading(model_type):
            shown = accepted(config_of(model_type), causal=False).shown
    except UserError as error:
        words = re.sub(r"^model .*?cannot be loaded: ", "", str(error))
        words = re.sub(r"^model type \S+ (is refused: )?", "", words)
        words = re.split(r"(\. |: )[Uu]se a type|\. Use ", words)[0]
        words = re.sub(r" \([\d.e+-]+ of the largest\)", "", words)
        return f"refused: {' '.join(words.split())}".replace("|", "\\|")
    return "exact" if shown else "cannot be built small: tried when it is loaded"


def rows() -> dict[str, str]:
    """As the document has them."""
    written = DOCUMENT.read_text().partition(HEAD)[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", written, re.MULTILINE))


def test_every_type_has_a_row() -> None:
    assert list(rows()) == TYPES
    assert all(re.match("exact$|refused: .|cannot be built small", row) for row in rows().values())


@pytest.mark.parametrize("model_type", SAMPLE)
def test_some_rows_are_true(model_type: str) -> None:
    assert outcome(model_type) == rows()[model_type]


@pytest.mark.slow
def test_every_row_is_true() -> None:
    found = {model_type: outcome(model_type) for model_type in TYPES}
    if os.environ.get("UPDATE_DOCS"):
        before, _, after = DOCUMENT.read_text().partition(HEAD)
        lines = "\n".join(f"| `{name}` | {row} |" for name, row in found.items())
        rest = after.partition("\n\n")[2]
        DOCUMENT.write_text(f"{before}{HEAD}{lines}\n\n{rest}")
    assert found == rows()


def test_changed_types_are_types() -> None:
    for model_type in CHANGED:
        assert AutoConfig.for_model(model_type).model_type == model_type
