"""An encoder, and the layers that were made one operation, can be pickled and copied."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama as llama

from llm2vec_ds import Encoder
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.fused_layers import fuse_layers
from llm2vec_ds.model.loading import TrunkOptions, load_trunk
from llm2vec_ds.recipe.sections import AdapterConfig
from tests.support.tiny import sentences

TEXTS = sentences(5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_an_encoder_gives_its_vectors(copied: Any, tiny_model_dir: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_model_dir)
    add_lora(encoder.trunk, AdapterConfig(zero_init=False))
    vectors = encoder.encode(TEXTS)
    other = copied(encoder)
    assert (other.encode(TEXTS) == vectors).all()
    assert [type(m) for m in other.modules()] == [type(m) for m in encoder.modules()]
    for parameter in other.parameters():  # its own, all of them
        parameter.data.zero_()
    assert (encoder.encode(TEXTS) == vectors).all()


def test_another_process_reads_a_pickled_encoder(tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_model_dir)
    (tmp_path / "encoder.pickle").write_bytes(pickle.dumps(encoder))
    code = (
        "import pickle, sys, numpy, torch; torch.set_num_threads(1);"
        "encoder = pickle.load(open(sys.argv[1] + '/encoder.pickle', 'rb'));"
        "numpy.save(sys.argv[1] + '/vectors.npy', encoder.encode(sys.argv[2:]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *TEXTS], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), encoder.encode(TEXTS), atol=1e-6)


def test_a_default_that_differs_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same code, but cos and sin lie along another dimension."""
    monkeypatch.setattr(llama.apply_rotary_pos_emb, "__defaults__", (2,))
    attention = llama.LlamaAttention(llama.LlamaConfig(hidden_size=32, num_attention_heads=4), 0)
    known = llama.apply_rotary_pos_emb
    other = type(known)(known.__code__, known.__globals__, known.__name__, (1,))
    forward = type(attention).forward
    own = {**forward.__globals__, "apply_rotary_pos_emb": other}

    class LlamaAttention(llama.LlamaAttention):
        pass

    LlamaAttention.forward = type(forward)(  # type: ignore[method-assign]
        forward.__code__, own, "forward", forward.__defaults__, forward.__closure__
    )
    attention.__class__ = LlamaAttention
    assert not fuse_layers(nn.Sequential(attention))


def test_what_a_function_encloses_counts() -> None:
    def forward_with(power: int) -> Any:
        def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states.pow(power)

        return forward

    from llm2vec_ds.model.fused_layers import _same_code

    assert _same_code(forward_with(2), forward_with(2))
    assert not _same_code(forward_with(2), forward_with(4))


def test_they_can_be_left_to_transformers(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trunk = load_trunk(str(tiny_model_dir), TrunkOptions(fused_layers="off"))
    assert "fused layers: off" in caplog.text
    assert type(trunk.norm) is llama.LlamaRMSNorm
    assert type(load_trunk(str(tiny_model_dir), TrunkOptions()).norm) is not llama.LlamaRMSNorm
