"""Turns texts with instructions into token ids, and into the span of tokens that pooling uses."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from llm2vec_ds.errors import UserError

log = logging.getLogger(__name__)

PLAIN = "{instruction} {text}"
CHAT = "chat"
TEXT_SPANS = ("offsets", "upstream")
"""How the text's own tokens are found. `offsets`: the tokens that hold its characters. `upstream`: the last
tokens, as many as the text has when it is tokenised alone. `llm2vec` 0.2 counts so, and this gives its exact
numbers. The count is wrong if a space before the first word changes the tokens."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_PROBE = "\ue000"  # a private-use character that no chat template contains


def is_text(value: object) -> TypeGuard[str]:
    """Returns whether `value` is a string that UTF-8 can hold.

    It cannot hold half of a surrogate pair, which is what remains of a text that was cut inside an emoji.
    """
    return isinstance(value, str) and not _LONE_SURROGATE.search(value)


@dataclass(frozen=True)
class Template:
    """How instruction and text become one string.

    Attributes:
        form: holds `{text}` once, and `{instruction}` at most once, before the text. For a text without
            instruction, `{instruction}` and one space after it are removed.
        special_tokens: whether the tokenizer adds its special tokens. A chat template already has them.
    """

    form: str = PLAIN
    special_tokens: bool = True

    def render(self, instruction: str | None, text: str) -> tuple[str, int, int]:
        """Returns the string to tokenise, and where the text begins and ends in it, in characters."""
        head, _, tail = self.form.partition("{text}")
        if instruction:
            head = head.replace("{instruction}", instruction.strip())
        else:
            head = head.replace("{instruction} ", "").replace("{instruction}", "")
        return head + text + tail, len(head), len(head) + len(text)


def template_for(choice: str | None, tokenizer: Any) -> Template:
    """Returns the template for a recipe's `data.template`: null (plain), `chat` (the tokenizer's), or a form.

    Raises:
        UserError: the form lacks `{text}`, or the tokenizer has no chat template.
    """
    if choice is None:
        return Template()
    if choice != CHAT:
        check_form(choice, "data.template")
        return Template(choice)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("data.template is `chat`, but the tokenizer has no chat template: write out a form")
    message = [{"role": "user", "content": _PROBE}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=False)
    if rendered.count(_PROBE) != 1:
        raise UserError(
            "the tokenizer's chat template does not contain a user's message exactly once: write out a form"
        )
    if any(added_ids(tokenizer)):
        log.warning(
            "data.template=chat: --format sentence-transformers and onnx cannot export this encoder, but "
            "--format transformers can. The chat template replaces the special tokens that the tokenizer "
            "adds, and sentence-transformers cannot leave those out. To export in all formats, write out a "
            "form in data.template that ends with {text}"
        )
    return Template(rendered.replace(_PROBE, PLAIN), special_tokens=False)


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the special tokens that the tokenizer puts before and after a text."""
    whole, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:start]), list(whole[start + len(bare) :])


def check_form(form: str, key: str) -> None:
    """Checks that a text fits into a template's form. `key` is where the user sets it."""
    if form.count("{text}") != 1 or form.count("{instruction}") > 1:
        raise UserError(f"{key} {form!r} must hold {{text}} once and {{instruction}} at most once")
    if "{instruction}" in form.partition("{text}")[2]:
        raise UserError(f"{key} {form!r}: {{instruction}} must come before {{text}}")


@dataclass(frozen=True)
class Prompt:
    """A text and its instruction. The model attends to the instruction, but it is not pooled."""

    instruction: str | None
    text: str

    def hash(self) -> int:
        """Returns 63 bits of the SHA-256. Equal texts have equal hashes on every machine."""
        digest = hashlib.sha256("\0".join([self.instruction or "", self.text]).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of one text, with instruction and special tokens. `pool_start:pool_end` is the text."""

    input_ids: Sequence[int]
    pool_start: int
    pool_end: int
    text_hash: int

    def __len__(self) -> int:
        return len(self.input_ids)


def check_tokenizer(tokenizer: Any) -> None:
    """Checks that the tokenizer gives character offsets. The span of a text needs them."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets: use a model with a tokenizer.json "
            "(a fast tokenizer), or convert it with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )


def tokenize(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    template: Template | None = None,
    *,
    end_with_eos: bool = False,
    text_span: str = "offsets",
) -> list[TokenizedText]:
    """Tokenises each instruction and text as one string. The tokenizer's offsets give the boundary.

    A token that begins before the boundary and ends after it (the space of " word") belongs to the
    text. Special tokens that the tokenizer adds are never pooled. A text without tokens has
    `pool_start == pool_end`.

    Args:
        end_with_eos: makes the end-of-sequence token the last one (for `eos` pooling).
        text_span: one of TEXT_SPANS.

    Raises:
        UserError: `end_with_eos` with a tokenizer that has no such token, or an unknown `text_span`.
    """
    template = template or Template()
    if text_span not in TEXT_SPANS:
        raise UserError(f"text_span {text_span!r} is unknown: choose {' or '.join(TEXT_SPANS)}")
    if end_with_eos and tokenizer.eos_token_id is None:
        raise UserError(
            "pooling `eos` needs a tokenizer with an end-of-sequence token: choose another pooling"
        )
    if not prompts:
        return []
    rendered = [template.render(prompt.instruction, prompt.text) for prompt in prompts]
    encoded = tokenizer(
        [string for string, _, _ in rendered],
        add_special_tokens=template.special_tokens,
        return_attention_mask=False,
        verbose=False,
    )
    texts = []
    for row, (prompt, (_, begin, finish)) in enumerate(zip(prompts, rendered, strict=True)):
        input_ids = encoded["input_ids"][row]
        start, end = 0, 0
        if prompt.text.strip():
            start, end = _span(encoded[row], begin, finish)
            if text_span == "upstream":
                start, end = _recounted(tokenizer, rendered[row][0][begin:], len(input_ids)), len(input_ids)
        if end_with_eos and (not input_ids or input_ids[-1] != tokenizer.eos_token_id):
            input_ids = [*input_ids, tokenizer.eos_token_id]
        texts.append(TokenizedText(input_ids, start, end, prompt.hash()))
    return texts


def _span(encoding: Any, begin: int, finish: int) -> tuple[int, int]:
    """Returns the first token with characters of `begin:finish`, and one past the last such token.

    It searches from both ends and asks for one token at a time. A list of all offsets would cost as much as
    tokenising. A special token that the tokenizer added has no characters (None).
    """
    start, end = 0, len(encoding)
    while start < end and ((place := encoding.token_to_chars(start)) is None or place[1] <= begin):
        start += 1
    while end > start and ((place := encoding.token_to_chars(end - 1)) is None or place[0] >= finish):
        end -= 1
    return start, end


def _recounted(tokenizer: Any, tail: str, n_tokens: int) -> int:
    """Returns where the text begins if it has as many tokens as `tail` has when it is tokenised alone."""
    alone = tokenizer(tail, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return max(0, n_tokens - len(alone["input_ids"]))


def drop_words(tokenizer: Any, text: str, max_text_tokens: int, max_tokens: int) -> str:
    """Shortens a text to its first words, until it has at most `max_text_tokens` tokens.

    Upstream `llm2vec` does the same. Each round keeps max_text_tokens / n of the words, where n is the number
    of tokens. No more than `max_tokens` tokens are counted.
    """
    while True:
        n_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        n_tokens = min(n_tokens, max_tokens)
        if n_tokens <= max_text_tokens:
            return text
        words = text.split()
        text = " ".join(words[: int(len(words) * (max_text_tokens / n_tokens))])


def truncate(text: TokenizedText, max_tokens: int) -> TokenizedText:
    """Cuts the end of the text itself. Instruction, template and special tokens stay whole."""
    return next(split(text, max_tokens))


def split(text: TokenizedText, max_tokens: int) -> Iterator[TokenizedText]:
    """Yields blocks of at most `max_tokens`. Each has the instruction, template and special tokens.

    Raises:
        UserError: instruction, template and special tokens leave no room for the text.
    """
    if len(text) <= max_tokens:
        yield text
        return
    head, tail = list(text.input_ids[: text.pool_start]), list(text.input_ids[text.pool_end :])
    room = max_tokens - len(head) - len(tail)
    if room < 1:
        raise UserError(
            f"instruction and special tokens take {len(head) + len(tail)} of max_tokens={max_tokens}: "
            "raise max_tokens, or shorten the instruction"
        )
    body = text.input_ids[text.pool_start : text.pool_end]
    for start in range(0, len(body), room):
        block = list(body[start : start + room])
        block_hash = text.text_hash if start == 0 else (text.text_hash + start) % 2**63
        yield TokenizedText(head + block + tail, len(head), len(head) + len(block), block_hash)
