"""Which tokens of a text make its vector: what llama.cpp can say of that, and what it cannot.

llama.cpp pools every token that it is given. It takes the mean, the first or the last; it knows no prompts.
"""

from __future__ import annotations

from gguf import PoolingType

from llm2vec_ds.data.prompts import Template, added_ids
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError

POOLING_TYPES = {
    "mean": PoolingType.MEAN,
    "last": PoolingType.LAST,
    "eos": PoolingType.LAST,
    "bos": PoolingType.CLS,
}
ELSEWHERE = "use --format sentence-transformers"
ALL_TOKENS = f"train with pooled_tokens=all, or {ELSEWHERE}"


def check_can_be_said(encoder: Encoder) -> None:
    """Refuses an encoder whose vectors of plain texts llama.cpp would not give.

    Raises:
        UserError: it pools what llama.cpp leaves out, or the other way round.
    """
    settings = encoder.settings
    template = Template(settings.template, settings.special_tokens)
    if settings.pooling not in POOLING_TYPES:
        raise UserError(f"--format gguf: llama.cpp has no pooling {settings.pooling!r}: {ELSEWHERE}")
    if settings.text_span != "offsets":
        raise UserError(
            f"--format gguf: llama.cpp has no text span of the kind {settings.text_span!r}: {ELSEWHERE}"
        )
    if settings.pooled_tokens == "all" or settings.pooling in ("eos", "bos"):
        return
    before, after = added_ids(encoder.tokenizer) if settings.special_tokens else ([], [])
    head, tail = around(template, None)
    if after or tail or (settings.pooling == "mean" and (before or head)):
        what = "template" if head or tail else "tokenizer's special tokens"
        raise UserError(
            f"--format gguf: llama.cpp pools the {what} too, which this encoder leaves out: {ALL_TOKENS}"
        )


def around(template: Template, instruction: str | None) -> tuple[str, str]:
    """What stands before a text and after it."""
    string, begin, end = template.render(instruction, "")
    return string[:begin], string[end:]


def notes_of(encoder: Encoder, n_tokens: int) -> list[str]:
    """What one has to do beside llama.cpp, each as a sentence; `n_tokens`: of the longest text."""
    settings = encoder.settings
    template = Template(settings.template, settings.special_tokens)
    notes = [
        "llama.cpp gives vectors of length 1.",
        f"llama.cpp does not cut texts: it refuses those of more than --ubatch-size tokens (512 by default); "
        f"this encoder cuts at {settings.max_tokens}. Start it with --ubatch-size {n_tokens}.",
    ]
    head, tail = around(template, None)
    if head or tail:
        notes.append(f"llama.cpp puts nothing around a text: send {head!r} + text + {tail!r}.")
    pools_all = settings.pooled_tokens == "all" or settings.pooling != "mean"
    for name, instruction in settings.prompts.items():
        head, tail = around(template, instruction)
        if pools_all:
            notes.append(f"llama.cpp knows no prompts: for {name!r} send {head!r} + text + {tail!r}.")
        else:
            notes.append(
                f"llama.cpp pools an instruction too, which this encoder leaves out: do not use {name!r} "
                "there."
            )
    return notes
