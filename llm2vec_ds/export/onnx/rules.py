"""What a graph of token ids and their mask can say of an encoder, and what not; the texts that check it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2vec_ds.data.prompts import Template, added_ids
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.checked import checked_texts
from llm2vec_ds.export.gguf.rope import length_of_change
from llm2vec_ds.export.onnx.graph import Pooled
from llm2vec_ds.export.sentence_transformers import DEFAULT_PROMPT, Plan, plan
from llm2vec_ds.model.bidirectional import is_causal

ELSEWHERE = "use --format sentence-transformers"
TEXTS_A_BATCH = 8
LONGEST_CHECKED = 2048
"""Tokens."""


@dataclass(frozen=True)
class OnnxPlan:
    """`as_modules`: the same in sentence-transformers' words, whose files stand beside the graph. `notes`:
    what one has to do beside it, each as a sentence."""

    as_modules: Plan
    pooled: Pooled
    notes: list[str]


def plan_onnx(encoder: Encoder) -> OnnxPlan:
    """How an encoder becomes a graph.

    Raises:
        UserError: it cannot.
    """
    settings = encoder.settings
    as_modules = plan(encoder)
    _check_trunk(encoder.trunk, settings.max_tokens)
    template = Template(settings.template, settings.special_tokens)
    head = template.render(None, "")[0]
    pools_all = settings.pooled_tokens == "all" or settings.pooling in ("eos", "bos", "last")
    if head and not pools_all:
        raise UserError(
            "--format onnx: the graph cannot know a template's tokens, which this encoder leaves out of the "
            f"vector: train with pooled_tokens=all, or {ELSEWHERE}"
        )
    before, after = ([], []) if pools_all else added_ids(encoder.tokenizer)
    pooled = Pooled(settings.pooling, len(before), len(after))
    return OnnxPlan(as_modules, pooled, _notes(as_modules, pools_all, settings.max_tokens))


def _check_trunk(trunk: Any, max_tokens: int) -> None:
    kind = trunk.config.model_type
    if is_causal(trunk.config) is not False:
        raise UserError(f"--format onnx: this one is causal; causal encoders are not supported: {ELSEWHERE}")
    longest = length_of_change(trunk.config)
    if longest is not None and max_tokens > longest:
        raise UserError(
            f"--format onnx: the RoPE of this {kind} changes beyond {longest} tokens, and a graph has one: "
            f"train with max_tokens of at most that (it is {max_tokens}), or {ELSEWHERE}"
        )


def _notes(as_modules: Plan, pools_all: bool, max_tokens: int) -> list[str]:
    notes = [
        "sentence_embedding has length 1; for a shorter Matryoshka vector take the first numbers and scale "
        "them to length 1 again.",
        f"The graph does not cut texts: let the tokenizer cut them at {max_tokens} tokens.",
    ]
    for name, head in as_modules.prompts.items():
        if name == as_modules.default_prompt == DEFAULT_PROMPT:
            notes.append(f"The graph puts nothing before a text: give {head!r} + text.")
        elif pools_all:
            notes.append(f"The graph knows no prompts: for {name!r} give {head!r} + text.")
        else:
            notes.append(
                f"sentence_embedding pools an instruction too, which this encoder leaves out: for {name!r} "
                "take last_hidden_state and pool the text's own tokens, as sentence-transformers does."
            )
    return notes


def checked_batches(encoder: Encoder) -> list[list[str]]:
    """Texts in batches of unequal length, the shortest and the longest also alone, one that has to be cut."""
    texts = checked_texts()
    sentence = texts[-1]
    n_tokens = len(encoder.tokenizer(sentence)["input_ids"])
    wanted = min(encoder.settings.max_tokens, LONGEST_CHECKED)
    longest = " ".join([sentence] * (wanted // n_tokens + 1))
    together = [texts[i : i + TEXTS_A_BATCH] for i in range(0, len(texts), TEXTS_A_BATCH)]
    return [*together, [texts[0]], [longest]]
