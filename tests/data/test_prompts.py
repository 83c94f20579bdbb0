"""Where the instruction ends and the text begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_ds.data.prompts import Prompt, check_tokenizer, split, template_for, tokenize, truncate
from llm2vec_ds.errors import UserError
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30
).filter(lambda text: text.strip())


@given(instruction=words, text=words)
def test_pooled_tokens_are_the_text(instruction: str, text: str) -> None:
    (tokens,) = tokenize(TOKENIZER, [Prompt(instruction, text)])
    pooled = TOKENIZER.decode(tokens.input_ids[tokens.pool_start : tokens.pool_end])
    # A byte-level token may hold the space before the text's first word, and nothing else before it.
    assert pooled in (text, f" {text}")
    assert TOKENIZER.decode(tokens.input_ids) == f"<s>{instruction.strip()} {text}"


def test_without_instruction_all_but_specials_is_pooled() -> None:
    (tokens,) = tokenize(TOKENIZER, [Prompt(None, "the river runs")])
    assert tokens.input_ids[0] == TOKENIZER.bos_token_id
    assert (tokens.pool_start, tokens.pool_end) == (1, len(tokens))


@pytest.mark.parametrize("text", ["", "   ", "\t"])
@pytest.mark.parametrize("instruction", [None, "the train"])
def test_blank_text_has_an_empty_span(text: str, instruction: str | None) -> None:
    (tokens,) = tokenize(TOKENIZER, [Prompt(instruction, text)])
    assert tokens.pool_start == tokens.pool_end


@given(instruction=st.one_of(st.none(), words), text=words)
def test_a_template_is_attended_and_not_pooled(instruction: str | None, text: str) -> None:
    template = template_for("Say: {instruction} [{text}] now", TOKENIZER)
    (tokens,) = tokenize(TOKENIZER, [Prompt(instruction, text)], template, end_with_eos=True)
    head = f"Say: {instruction.strip()} [" if instruction else "Say: ["
    assert TOKENIZER.decode(tokens.input_ids) == f"<s>{head}{text}] now</s>"
    pooled = TOKENIZER.decode(tokens.input_ids[tokens.pool_start : tokens.pool_end])
    assert text.strip() in pooled
    assert len(pooled) <= len(text) + 2  # a token may hold the bracket next to the text


def test_the_tokenizers_own_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>[{{ m.role }}] {{ m.content | trim }} [end]{% endfor %}"
    )
    template = template_for("chat", tokenizer)
    for instruction, rendered in (
        ("bread", "<s>[user] bread rain falls [end]"),
        (None, "<s>[user] rain falls [end]"),
    ):
        (tokens,) = tokenize(tokenizer, [Prompt(instruction, "rain falls")], template)
        assert tokenizer.decode(tokens.input_ids) == rendered
        assert tokenizer.decode(tokens.input_ids[tokens.pool_start : tokens.pool_end]).strip() == "rain falls"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("no place", "must hold {text} once"),
        ("{text} {text}", "must hold {text} once"),
        ("{text} {instruction}", "must come before"),
        ("chat", "the tokenizer has no chat template"),
    ],
)
def test_unusable_templates(form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        template_for(form, TOKENIZER)


def test_truncation_keeps_instruction_and_specials() -> None:
    (tokens,) = tokenize(
        TOKENIZER, [Prompt("the old mill", "the river runs past an old mill where children fish")]
    )
    short = truncate(tokens, tokens.pool_start + 2)
    assert len(short) == tokens.pool_start + 2
    assert list(short.input_ids) == list(tokens.input_ids[: tokens.pool_start + 2])
    assert (short.pool_start, short.pool_end) == (tokens.pool_start, len(short))


def test_no_room_for_the_text_is_refused() -> None:
    (tokens,) = tokenize(TOKENIZER, [Prompt("the old mill where children fish", "bread is baked")])
    with pytest.raises(UserError, match="raise max_tokens, or shorten the instruction"):
        truncate(tokens, tokens.pool_start)


def test_blocks_cover_the_text_and_are_told_apart() -> None:
    (tokens,) = tokenize(
        TOKENIZER, [Prompt(None, "the river runs past an old mill where children fish for trout")]
    )
    blocks = list(split(tokens, 5))
    body = [i for block in blocks for i in block.input_ids[block.pool_start : block.pool_end]]
    assert body == list(tokens.input_ids[1:])
    assert all(len(block) <= 5 and block.input_ids[0] == TOKENIZER.bos_token_id for block in blocks)
    assert len({block.text_hash for block in blocks}) == len(blocks) > 1


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(UserError, match="SlowTokenizer gives no character offsets"):
        check_tokenizer(SlowTokenizer())
