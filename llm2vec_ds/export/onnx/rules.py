"""Rules for which encoders an ONNX graph can express, notes for its users, and the texts that check it.

The graph sees only token ids and their mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2vec_ds.data.prompts import Template, added_ids
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.export.checked import checked_texts
from llm2vec_ds.export.onnx.graph import POOLINGS_OF_GRAPH, Pooled
from llm2vec_ds.export.sentence_transformers import Plan, plan
from llm2vec_ds.model.bidirectional import is_causal
from llm2vec_ds.model.pooling import OF_ONE_TOKEN
from llm2vec_ds.model.rope import length_of_change

ELSEWHERE = "use --format sentence-transformers"
TEXTS_A_BATCH = 8
LONGEST_CHECKED = 2048
"""The longest checked text has at most about this many tokens."""


@dataclass(frozen=True)
class OnnxPlan:
    """How an encoder becomes a graph.

    Attributes:
        as_modules: the encoder in sentence-transformers' modules, whose files are written beside the graph.
        pooled: the tokens that make a vector.
        notes: notes for users of the graph, each a sentence.
    """

    as_modules: Plan
    pooled: Pooled
    notes: list[str]


def plan_onnx(encoder: Encoder) -> OnnxPlan:
    """Plans how an encoder becomes a graph.

    Raises:
        UserError: a graph cannot express the encoder.
    """
    settings = encoder.settings
    as_modules = plan(encoder)
    if settings.pooling not in POOLINGS_OF_GRAPH:
        raise UserError(
            f"--format onnx: the graph has no pooling {settings.pooling!r}: use --format transformers"
        )
    _check_trunk(encoder.trunk, settings.max_tokens)
    template = Template(settings.template, settings.special_tokens)
    head = template.render(None, "")[0]
    pools_all = settings.pooled_tokens == "all" or settings.pooling in OF_ONE_TOKEN
    if head and not pools_all:
        raise UserError(
            "--format onnx: this encoder leaves the template's tokens out of the vector, and a graph cannot "
            f"recognize them: train with pooled_tokens=all, or {ELSEWHERE}"
        )
    before, after = ([], []) if pools_all else added_ids(encoder.tokenizer)
    pooled = Pooled(settings.pooling, len(before), len(after))
    return OnnxPlan(as_modules, pooled, _notes(as_modules, pools_all, settings.max_tokens))


def _check_trunk(trunk: Any, max_tokens: int) -> None:
    kind = trunk.config.model_type
    if is_causal(trunk.config) is not False:
        raise UserError(f"--format onnx exports bidirectional encoders, and this one is causal: {ELSEWHERE}")
    longest = length_of_change(trunk.config)
    if longest is not None and max_tokens > longest:
        raise UserError(
            f"--format onnx: the RoPE of this {kind} changes beyond {longest} tokens, which a graph cannot "
            f"express: train with max_tokens of at most {longest} (it is {max_tokens}), or {ELSEWHERE}"
        )


def _notes(as_modules: Plan, pools_all: bool, max_tokens: int) -> list[str]:
    notes = [
        "sentence_embedding has length 1. For a shorter Matryoshka vector, take its first numbers and scale "
        "them to length 1 again.",
        f"The graph does not cut texts: let the tokenizer cut them at {max_tokens} tokens.",
    ]
    for name, head in as_modules.prompts.items():
        if name == as_modules.default_prompt:
            notes.append(f"The graph does not add the template: give {head!r} + text.")
        elif pools_all:
            notes.append(f"The graph does not know prompts: for {name!r} give {head!r} + text.")
        else:
            notes.append(
                f"sentence_embedding also pools the instruction, which this encoder leaves out: for {name!r} "
                "take last_hidden_state and pool the text's own tokens, as sentence-transformers does."
            )
    return notes


def checked_batches(encoder: Encoder) -> list[list[str]]:
    """Returns batches of texts of different lengths. The shortest text is also a batch of its own.

    The last batch is one long text. It is longer than `max_tokens` if that is at most LONGEST_CHECKED.
    """
    texts = checked_texts()
    sentence = texts[-1]
    n_tokens = len(encoder.tokenizer(sentence)["input_ids"])
    wanted = min(encoder.settings.max_tokens, LONGEST_CHECKED)
    longest = " ".join([sentence] * (wanted // n_tokens + 1))
    together = [texts[i : i + TEXTS_A_BATCH] for i in range(0, len(texts), TEXTS_A_BATCH)]
    return [*together, [texts[0]], [longest]]
