"""Every supported model type, tiny and random: bidirectional, packed = padded = alone, and it trains."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.model.bidirectional import check_can_be_bidirectional, has_own_flag, is_causal
from llm2vec_ds.objectives.contrastive.info_nce import ContrastiveLoss, PairVectors
from llm2vec_ds.objectives.mntp.head import MaskedTokenHead, MntpModel
from llm2vec_ds.recipe.objectives import ContrastiveConfig
from tests.support.model_types import SIZES, TYPES, build
from tests.support.tiny import tiny_tokenizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


LENGTHS = (7, 1, 12, 7, 3)


def texts() -> list[TokenizedText]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in LENGTHS]
    return [TokenizedText(row, 0, len(row), number) for number, row in enumerate(rows)]


def padded(trunk: Any, rows: list[TokenizedText], side: str) -> torch.Tensor:
    """Hidden states of the real tokens, in the order of the packed stream."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 2), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row.input_ids)
        mask[i, start : start + len(row)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state[mask.bool()]
    return hidden


def with_gradients(trunk: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((hidden * weight).sum(), parameters, allow_unused=True)
    return [hidden.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("model_type", TYPES)
def test_packed_equals_padded_and_alone(model_type: str) -> None:
    trunk, rows = build(model_type).base_model, texts()
    encoder = Encoder(trunk, tiny_tokenizer())
    check_can_be_bidirectional(trunk)
    ours = with_gradients(trunk, encoder.hidden_states(pack(rows)))
    assert max(g.abs().max() for g in ours[1:]) > 1e-2
    eager = build(model_type, attention="eager").base_model
    rivals = {
        "alone": (trunk, torch.cat([encoder.hidden_states(pack([row])) for row in rows])),
        "padded left": (trunk, padded(trunk, rows, "left")),
        "padded right": (trunk, padded(trunk, rows, "right")),
        "eager transformers, padded right": (eager, padded(eager, rows, "right")),
    }
    for name, (model, hidden) in rivals.items():
        for a, b in zip(ours, with_gradients(model, hidden), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())), msg=name)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_last_token_moves_the_first_and_the_reverse(model_type: str) -> None:
    ids = list(range(10, 16))
    for causal in (False, True):
        encoder = Encoder(build(model_type, causal=causal).base_model, tiny_tokenizer())
        assert bool(is_causal(encoder.trunk.config)) is causal
        with torch.no_grad():
            plain, last, first = (
                encoder.hidden_states(pack([TokenizedText(row, 0, 6, 0)]))
                for row in (ids, [*ids[:-1], 99], [99, *ids[1:]])
            )
        assert bool((plain[0] - last[0]).abs().max() > 1e-5) is not causal
        assert (plain[5] - first[5]).abs().max() > 1e-5


@pytest.mark.parametrize("model_type", TYPES)
def test_mntp_and_simcse_take_a_step_that_helps(model_type: str) -> None:
    rows = texts()
    labels = [np.where(np.arange(len(row)) % 2 == 1, row.input_ids, -100) for row in rows]
    model = build(model_type)
    mntp = MntpModel(
        Encoder(model.base_model, tiny_tokenizer()),
        MaskedTokenHead(model.lm_head, model.config, chunk_tokens=4),
    )

    def mntp_loss() -> torch.Tensor:
        return mntp(pack(rows, labels))[0].mean()

    def simcse_loss() -> torch.Tensor:
        vectors = mntp.encoder(pack(rows))
        ids = torch.arange(len(rows) - 1)
        pairs = PairVectors(vectors[:-1], vectors[1:], vectors[:0], ids, ids, ids[:0])
        share, *_ = ContrastiveLoss(ContrastiveConfig())(pairs, torch.tensor(2.0))
        return share

    for loss_of in (mntp_loss, simcse_loss):
        optimizer = torch.optim.SGD(mntp.parameters(), lr=1e-4)
        before = loss_of()
        before.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert before.isfinite()
        assert loss_of() < before


@pytest.mark.parametrize("model_type", TYPES)
def test_head_equals_the_models_own_logits(model_type: str) -> None:
    """Softcap, scaling and tying as the model has them."""
    model, row = build(model_type), texts()[2]
    label = np.where(np.arange(len(row)) % 2 == 1, row.input_ids, -100)
    mntp = MntpModel(
        Encoder(model.base_model, tiny_tokenizer()),
        MaskedTokenHead(model.lm_head, model.config, chunk_tokens=4),
    )
    ours = mntp(pack([row], [label]))[0]
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
    where = np.flatnonzero(label != -100)
    expected = torch.nn.functional.cross_entropy(
        logits[where - 1], torch.tensor(label[where]), reduction="none"
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_table_in_the_document_lists_these_types() -> None:
    """`UPDATE_DOCS=1 pytest tests/model/test_architectures.py` writes it."""
    features = {
        "sliding_window": "sliding window",
        "attn_logit_softcapping": "attention softcap",
        "final_logit_softcapping": "logit softcap",
        "num_local_experts": "experts",
        "logits_scaling": "logit scaling",
        "no_rope_layer_interval": "layers without RoPE",
        "num_experts": "experts",
        "n_routed_experts": "experts",
        "per_layer_config": "heads of two widths",
        "kv_lora_rank": "latent attention",
    }
    lines = []
    for model_type, changes in TYPES.items():
        config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
        flag = "use_bidirectional_attention" if has_own_flag(config) else "is_causal"
        tested = ", ".join(label for key, label in features.items() if key in changes) or "–"
        lines.append(f"| `{model_type}` | `{flag}` | {tested} |")
    text = DOCUMENT.read_text()
    written = re.search(
        r"\| model type \| flag in config.json \| tested with \|\n\|[-|]+\|\n((?:.+\n)*)", text
    )
    assert written is not None
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(text.replace(written.group(1), "\n".join(lines) + "\n"))
    else:
        assert written.group(1).strip() == "\n".join(lines)
