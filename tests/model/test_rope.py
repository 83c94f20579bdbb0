"""Angles of each text of a packed stream or a padded batch are those that it has alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from llm2vec_ds.model.rope import RopeByText, choose_rope_by_text, text_lengths
from tests.support.model_types import SIZES

LIMIT = 12
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
}
LENGTHS = (LIMIT, 30, 3, LIMIT + 1, 21, 1, 30)


def trunk_with(kind: str) -> Any:
    changes = {"max_position_embeddings": LIMIT if kind == "dynamic" else 64, "rope_parameters": ROPES[kind]}
    if kind == "longrope":
        changes["original_max_position_embeddings"] = LIMIT
    model_type = "phi3" if kind == "longrope" else "llama"
    return AutoModel.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes}))


def alone(kind: str, length: int) -> list[torch.Tensor]:
    """By a rotary embedding of transformers that has seen nothing else."""
    rope = trunk_with(kind).rotary_emb
    return [angles[0] for angles in rope(torch.zeros(1, length, 4), torch.arange(length)[None])]


@pytest.mark.parametrize("kind", ROPES)
def test_packed_texts_have_their_own_angles(kind: str) -> None:
    trunk = trunk_with(kind)
    choose_rope_by_text(trunk)
    assert isinstance(trunk.rotary_emb, RopeByText)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    for lengths in (LENGTHS, LENGTHS[::-1]):  # the second call must not remember the first
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        angles = trunk.rotary_emb(torch.zeros(1, positions.shape[1], 4), positions)
        for found, *right in zip(angles, *(alone(kind, n) for n in lengths), strict=True):
            torch.testing.assert_close(found[0], torch.cat(right), rtol=0, atol=0)
    long, short = alone(kind, LIMIT + 1), alone(kind, LIMIT)
    assert (long[0][:LIMIT] - short[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_have_their_own_angles(kind: str, side: str) -> None:
    trunk = trunk_with(kind)
    choose_rope_by_text(trunk)
    longest = max(LENGTHS)
    mask = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        mask[row, longest - n if side == "left" else 0 :][:n] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    angles = trunk.rotary_emb(torch.zeros(*mask.shape, 4), positions)
    for row, n in enumerate(LENGTHS):
        for found, right in zip(angles, alone(kind, n), strict=True):
            torch.testing.assert_close(found[row][mask[row].bool()], right, rtol=0, atol=0)


def test_lengths_of_texts() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 2, 3]])
    assert text_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2], [1, 1, 4, 4, 4, 4]]


def test_other_ropes_stay_and_copies_are_whole() -> None:
    plain = AutoModel.from_config(AutoConfig.for_model("llama", **SIZES))
    kept = plain.rotary_emb
    choose_rope_by_text(plain)
    assert plain.rotary_emb is kept
    trunk = trunk_with("longrope")
    names = set(trunk.state_dict())
    choose_rope_by_text(trunk)
    choose_rope_by_text(trunk)
    assert not isinstance(trunk.rotary_emb.rope, RopeByText)
    assert set(trunk.state_dict()) == names
    x, positions = torch.zeros(1, 30, 4), torch.arange(30)[None]
    right = trunk.rotary_emb(x, positions)
    for copied in (copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
        assert all(map(torch.equal, copied.rotary_emb(x, positions), right))
