"""A trunk's passes as recordings: filled up, and replayed to the bit.

By CUDA graphs where there is a GPU, else by a stand-in.
"""

from __future__ import annotations

import weakref
from functools import partial
from itertools import pairwise, product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.packing import pack
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.adapters import add_lora
from llm2vec_ds.model.attention import register
from llm2vec_ds.model.fused_layers import fuse_layers
from llm2vec_ds.model.graphs.lengths import RATIO, length_for, lengths_up_to
from llm2vec_ds.model.graphs.proof import prove
from llm2vec_ds.model.graphs.recorder import CudaRecorder
from llm2vec_ds.model.graphs.static_inputs import StaticInputs
from llm2vec_ds.model.graphs.suitable import cannot_be_recorded
from llm2vec_ds.model.graphs.trunk import GraphedTrunk
from llm2vec_ds.model.hidden_states import seeded_hidden_states, trunk_hidden_states
from llm2vec_ds.model.recomputation import recompute_activations
from llm2vec_ds.model.rope import choose_rope_by_text
from llm2vec_ds.recipe.sections import AdapterConfig
from tests.support.model_types import build
from tests.support.recorded_operations import RecordedOperations
from tests.support.tiny_trunk import trunk as tiny_trunk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = ("llama", "qwen3", "gemma3_text", "mistral", "phi3")


def batch_of(*lengths: int, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]
    return pack([TokenizedText(row, 0, len(row), number) for number, row in enumerate(rows)]).to(DEVICE)


BATCHES = (batch_of(9, 5, 9, 30), batch_of(1, 1, 60, seed=1), batch_of(40, 24, seed=2), batch_of(80, seed=3))
"""Of 53, 62, 64 and 80 tokens: of two lengths, the last two without filler."""
NAME = "layers.1.mlp.up_proj.lora_A.default.weight"
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def trained_trunk(
    model_type: str = "llama",
    which: Any = "none",
    dropout: float = 0.3,
    attention: str = "auto",
    attention_dropout: float = 0.0,
    n_layers: int = 4,
) -> nn.Module:
    trunk: Any = build(model_type, register(attention)).base_model.to(DEVICE)
    trunk.layers = trunk.layers[:n_layers]
    trunk.config.num_hidden_layers = n_layers
    for layer in trunk.layers:
        layer.self_attn.attention_dropout = attention_dropout
    fuse_layers(trunk)
    torch.manual_seed(1)
    add_lora(trunk, AdapterConfig(rank=2, dropout=dropout, zero_init=False))
    recompute_activations(trunk, which)
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    trained: nn.Module = trunk.train()
    return trained


class CountedGraphs(CudaRecorder):
    def __init__(self) -> None:
        super().__init__(DEVICE)
        self.n_recordings = self.n_replays = 0

    def record(self, run: Any) -> Any:
        self.n_recordings += 1
        outcome, replay = super().record(run)

        def counted() -> None:
            self.n_replays += 1
            replay()

        return outcome, counted


def own_recorder() -> RecordedOperations | CountedGraphs:
    return CountedGraphs() if DEVICE.type == "cuda" else RecordedOperations()


def graphed(trunk: nn.Module, **options: Any) -> tuple[GraphedTrunk, RecordedOperations | CountedGraphs]:
    recorder = own_recorder()
    return GraphedTrunk(trunk, recorder, longest=80, longest_text=80, **options), recorder


def step(trunk: nn.Module, run: Any, batches: tuple[PackedBatch, ...] = BATCHES) -> list[torch.Tensor]:
    """Hidden states of each batch, and the gradients of all together."""
    trained = [p for p in trunk.parameters() if p.requires_grad]
    for parameter in trained:
        assert parameter.grad is not None
        parameter.grad.zero_()
    found = []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        hidden = run(batch)
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        (hidden * weight).sum().backward()
        found.append(hidden.detach())
    return found + [p.grad.clone() for p in trained if p.grad is not None]


@pytest.mark.parametrize("longest", [1, 64, 100, 4096, 32_768])
def test_neighbouring_lengths_are_close_and_hold_all(longest: int) -> None:
    lengths = lengths_up_to(longest)
    assert lengths[-1] - longest < 16
    assert all(a < b <= RATIO * a for a, b in pairwise(lengths))
    assert all(length % 16 == 0 for length in lengths)
    for n_tokens in (1, longest // 2 + 1, longest):
        found = length_for(n_tokens, lengths)
        assert found is not None
        assert found >= n_tokens
        assert found <= max(RATIO * n_tokens + 16, lengths[0])
    assert length_for(lengths[-1] + 1, lengths) is None


def test_filler_is_texts_of_one_token_and_the_rest_are_empty() -> None:
    inputs = StaticInputs.empty(8, 8, torch.device("cpu"))
    for lengths in ((3, 2), (8,), (1, 1), (1,) * 8):
        batch = batch_of(*lengths)
        inputs.fill(batch, 7)
        n = sum(lengths)
        bounds = torch.tensor([0, *lengths]).cumsum(0).tolist() + list(range(n + 1, 9))
        assert inputs.batch.cu_seqlens.tolist() == bounds + [8] * (9 - len(bounds))
        assert inputs.batch.input_ids.tolist() == [*batch.input_ids, *batch.input_ids[:1].tolist() * (8 - n)]
        assert inputs.batch.position_ids.tolist() == batch.position_ids.tolist() + [0] * (8 - n)
        assert int(inputs.seed) == 7


@pytest.mark.parametrize("model_type", TYPES)
def test_filled_is_unfilled_to_rounding(model_type: str) -> None:
    """Hidden states and every gradient, with dropout."""
    trunk = trained_trunk(model_type)
    own, _ = graphed(trunk)
    for found, expected in zip(
        step(trunk, own.filled), step(trunk, partial(seeded_hidden_states, trunk)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("model_type", "which"), [("llama", "selective"), *((model_type, "none") for model_type in TYPES)]
)
def test_a_replay_is_the_filled_pass_to_the_bit(model_type: str, which: str) -> None:
    trunk = trained_trunk(model_type, which)
    own, recorder = graphed(trunk)
    expected = step(trunk, own.filled)
    for _ in range(2):
        found = step(trunk, own)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.n_recordings == 4  # forward and backward of two lengths
    assert recorder.n_replays == 2 * 2 * len(BATCHES)


def test_triton_sees_the_bounds_and_seeds_of_each_replay() -> None:
    """Which tokens see each other is made again in each replay, with a window and without, and so is the
    dropout of attention. The interpreter is slow: few tokens, two layers."""
    trunk = trained_trunk("gemma3_text", attention="triton", attention_dropout=0.3, n_layers=2)
    own = GraphedTrunk(trunk, own_recorder(), longest=16, longest_text=16)
    batches = (batch_of(5, 3), batch_of(1, 9, seed=1))
    expected = step(trunk, own.filled, batches)
    found = step(trunk, own, batches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_pass_draws_other_masks_which_the_generator_fixes() -> None:
    trunk = trained_trunk()
    own, _ = graphed(trunk)
    batch = BATCHES[0]
    torch.manual_seed(0)
    first, second = own(batch), own(batch)
    torch.manual_seed(0)
    assert torch.equal(own(batch), first)
    assert not torch.equal(first, second)
    trunk.eval()
    assert torch.equal(own(batch), own(batch))


@pytest.mark.parametrize(
    "contexts", [[torch.no_grad, torch.inference_mode], [torch.inference_mode, torch.no_grad]]
)
def test_passes_without_gradient_share_recordings_that_training_does_not(contexts: list[Any]) -> None:
    """Whichever came first."""
    trunk = trained_trunk().eval()
    own, recorder = graphed(trunk)
    for context, batch in product(contexts, 2 * BATCHES):  # a length is recorded when it comes again
        with context():
            torch.testing.assert_close(own(batch), trunk_hidden_states(trunk, batch), rtol=1e-4, atol=1e-5)
    assert recorder.n_recordings == 2
    trunk.train()
    expected = step(trunk, own.filled)
    assert all(torch.equal(a, b) for a, b in zip(step(trunk, own), expected, strict=True))


def test_a_larger_batch_runs_as_it_is() -> None:
    trunk = trained_trunk()
    own, recorder = graphed(trunk)
    large = (batch_of(60, 60, seed=4),)
    assert all(
        map(torch.equal, step(trunk, own, large), step(trunk, partial(seeded_hidden_states, trunk), large))
    )
    assert recorder.n_recordings == 0


def test_fill_share_counts_filler_since_the_last_call() -> None:
    trunk = trained_trunk().eval()
    own, _ = graphed(trunk)
    with torch.no_grad():
        own(BATCHES[0])
        own(BATCHES[1])
    assert own.fill_share() == (2 * 64 - 53 - 62) / 128
    assert own.fill_share() == 0.0


def test_moved_weights_are_recorded_again() -> None:
    trunk = trained_trunk(dropout=0.0)
    name, moved = next((n, p) for n, p in trunk.named_parameters() if p.requires_grad)
    own, recorder = graphed(trunk, places=lambda: moved.data_ptr())
    step(trunk, own)
    moved.data = moved.data * 2
    found = step(trunk, own)
    assert recorder.n_recordings == 8
    for ours, expected in zip(found, step(trunk, own.filled), strict=True):
        assert torch.equal(ours, expected), name


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_recording_that_fails_leaves_the_device_as_it_was() -> None:
    recorder, x = CudaRecorder(torch.device("cuda", 0)), torch.ones(5, device=DEVICE)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        recorder.record(x.nonzero)
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert torch.randn(3, device=DEVICE).isfinite().all()
    outcome, replay = recorder.record(lambda: x + 1)
    replay()
    assert outcome.tolist() == [2.0] * 5


def test_a_length_that_comes_once_is_not_recorded_without_gradient() -> None:
    own, recorder = graphed(trained_trunk().eval())
    with torch.no_grad():
        first = own(BATCHES[0])
        assert recorder.n_recordings == 0
        assert torch.equal(own(BATCHES[0]), first)
        assert recorder.n_recordings == 1


def test_what_cannot_be_recorded_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the device refused first, not by what came of it."""
    own, recorder = graphed(trained_trunk())
    monkeypatch.setattr(recorder, "record", raising(RuntimeError("operation not permitted")))
    with pytest.raises(UserError, match=r"64 tokens cannot be recorded \(operation not permitted"):
        own(BATCHES[0])


def test_a_full_memory_ends_recording_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager pass needs the memory of the recordings. So they go, though an old loss is still alive."""
    trunk = trained_trunk()
    own, recorder = graphed(trunk)
    expected = step(trunk, own.filled)
    loss = own(BATCHES[0]).sum()
    loss.backward()
    recording = weakref.ref(next(iter(own._recordings.values())))
    forgotten = mock.Mock(side_effect=recorder.forget)
    monkeypatch.setattr(recorder, "forget", forgotten)
    monkeypatch.setattr(recorder, "record", raising(torch.OutOfMemoryError("CUDA out of memory")))
    found = step(trunk, own)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert loss.isfinite()
    assert recording() is None
    assert forgotten.call_count == 1
    n_replays = recorder.n_replays
    step(trunk, own)
    assert recorder.n_replays == n_replays


def raising(error: Exception) -> Any:
    """As CUDA does: the end of a recording that failed raises another error."""

    def record(run: Any) -> None:
        try:
            raise error
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    return record


def test_another_pass_before_backward_is_an_error() -> None:
    trunk = trained_trunk()
    own, _ = graphed(trunk)
    hidden = own(BATCHES[0])
    with torch.no_grad():
        own(BATCHES[1])
    with pytest.raises(RuntimeError, match="overwrote what it had saved"):
        hidden.sum().backward()


@pytest.mark.parametrize(
    ("changes", "adapter", "which", "reason"),
    [
        ({"num_experts": 4}, {}, "none", "its experts take tokens in groups"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, {}, "none", "its chunked attention cuts"),
        ({}, {}, "full", "activation checkpointing runs whole layers twice"),
        ({"rope_parameters": DYNAMIC}, {}, "none", "its RoPE depends on the lengths"),
        ({}, {"variant": "dora"}, "none", "its adapters are not plain LoRA"),
        ({}, {}, "none", "attention 'torch' depends on the number of texts"),
    ],
)
def test_what_cannot_be_recorded_is_named(
    changes: dict[str, Any], adapter: dict[str, Any], which: Any, reason: str
) -> None:
    trunk = tiny_trunk(**changes)
    choose_rope_by_text(trunk)
    add_lora(trunk, AdapterConfig(rank=2, **adapter))
    recompute_activations(trunk, which)
    found = cannot_be_recorded(trunk)
    assert found is not None
    assert reason in found


def test_a_proof_compares_every_gradient_and_leaves_none() -> None:
    trunk = trained_trunk()
    own, _ = graphed(trunk)
    before, weights = torch.get_rng_state(), [p.detach().clone() for p in trunk.parameters()]
    assert prove(trunk, own, BATCHES[:2]) == ("hidden states of batch 0", 0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, weights, trunk.parameters()))
    parameters = {name: p for name, p in trunk.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and not p.grad.any() for p in parameters.values())

    def enlarge(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad *= 1.01

    class Wrong(GraphedTrunk):
        def filled(self, batch: PackedBatch) -> torch.Tensor:
            parameters[NAME].register_post_accumulate_grad_hook(enlarge)
            return super().filled(batch)

    wrong = Wrong(trunk, own_recorder(), longest=80, longest_text=80)
    proof = prove(trunk, wrong, BATCHES[:1])
    assert proof.worst == NAME
    assert 0.005 < proof.error < 0.05
    assert not proof.holds
