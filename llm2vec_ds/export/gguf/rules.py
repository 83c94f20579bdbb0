"""Rules for which encoders llama.cpp can express, and notes for its users.

llama.cpp pools every token that it gets: their mean, the first or the last. It does not know prompts.
"""

from __future__ import annotations

from gguf import PoolingType

from llm2vec_ds.data.prompts import Template, added_ids
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.pooling import OF_ONE_TOKEN

POOLING_TYPES = {
    "mean": PoolingType.MEAN,
    "last": PoolingType.LAST,
    "eos": PoolingType.LAST,
    "bos": PoolingType.CLS,
}
UBATCH_TOKENS = 512
"""llama.cpp's default of --ubatch-size."""
ELSEWHERE = "use --format sentence-transformers"
ALL_TOKENS = f"train with pooled_tokens=all, or {ELSEWHERE}"


def check_can_be_said(encoder: Encoder) -> None:
    """Refuses an encoder if llama.cpp would give other vectors for plain texts.

    Raises:
        UserError: the encoder and llama.cpp pool different tokens.
    """
    settings = encoder.settings
    template = Template(settings.template, settings.special_tokens)
    if settings.pooling not in POOLING_TYPES:
        raise UserError(
            f"--format gguf: llama.cpp has no pooling {settings.pooling!r}: use --format transformers"
        )
    if settings.text_span != "offsets":
        raise UserError(
            f"--format gguf: llama.cpp does not support text_span={settings.text_span!r}: {ELSEWHERE}"
        )
    if settings.pooled_tokens == "all" or settings.pooling in ("eos", "bos"):
        return
    before, after = added_ids(encoder.tokenizer) if settings.special_tokens else ([], [])
    head, tail = around(template, None)
    if after or tail or (settings.pooling == "mean" and (before or head)):
        what = "template" if head or tail else "tokenizer's special tokens"
        raise UserError(
            f"--format gguf: llama.cpp also pools the {what}, which this encoder leaves out: {ALL_TOKENS}"
        )


def around(template: Template, instruction: str | None) -> tuple[str, str]:
    """Returns the strings that go before a text and after it."""
    string, begin, end = template.render(instruction, "")
    return string[:begin], string[end:]


def notes_of(encoder: Encoder, n_tokens: int) -> list[str]:
    """Returns notes for users of llama.cpp, each a sentence. The longest text has `n_tokens` tokens."""
    settings = encoder.settings
    template = Template(settings.template, settings.special_tokens)
    notes = ["llama.cpp gives vectors of length 1."]
    if n_tokens > UBATCH_TOKENS:
        notes.append(
            f"llama.cpp refuses texts of more than --ubatch-size tokens ({UBATCH_TOKENS} by default). This "
            f"encoder cuts texts at {settings.max_tokens} tokens instead. Start llama.cpp with --ubatch-size "
            f"{n_tokens}."
        )
    head, tail = around(template, None)
    if head or tail:
        notes.append(f"llama.cpp does not add the template: send {head!r} + text + {tail!r}.")
    pools_all = settings.pooled_tokens == "all" or settings.pooling in OF_ONE_TOKEN
    for name, instruction in settings.prompts.items():
        head, tail = around(template, instruction)
        if pools_all:
            notes.append(f"llama.cpp does not know prompts: for {name!r} send {head!r} + text + {tail!r}.")
        else:
            notes.append(
                f"llama.cpp also pools the instruction, which this encoder leaves out: do not use prompt "
                f"{name!r} with it."
            )
    return notes
