"""Runs a trunk's passes as recordings. There is one for each length and kind of pass.

A recorded pass is a single call from Python. Pooling, heads and losses are not recorded, and see no filler.

Shape legend: T tokens of a micro-batch, L tokens of the recorded stream (T and filler), D width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from llm2vec_kernels.seeds import Seeds
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.errors import UserError, chain_of
from llm2vec_ds.model.graphs.lengths import length_for, lengths_up_to
from llm2vec_ds.model.graphs.recorder import Recorder, Replay
from llm2vec_ds.model.graphs.static_inputs import StaticInputs
from llm2vec_ds.model.hidden_states import (
    drawn_dropout_seed,
    seeded_hidden_states,
    trunk_hidden_states,
)
from llm2vec_ds.process.full_memory import full_memory

log = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """The passes that one recording serves."""

    length: int
    with_gradient: bool
    training: bool


@dataclass(frozen=True)
class _Recording:
    """A recorded pass.

    Attributes:
        outcome: shared by all recordings. The result of a pass is read before the next pass starts.
    """

    inputs: StaticInputs
    outcome: _Outcome
    forward: Replay
    backward: Replay


class _Outcome(NamedTuple):
    """Hidden states of a pass and their gradient, each `[L, D]` with L the longest length."""

    hidden_LD: torch.Tensor
    d_hidden_LD: torch.Tensor


class GraphedTrunk:
    """Replaces `trunk_hidden_states`: fills a batch up to one of a few lengths and replays a recording.

    Backward adds to the `.grad` of the trained parameters, so each must have one. No other pass may run
    between a pass with gradient and its backward.

    Attributes:
        n_tokens, n_filled: real tokens and filler tokens of the passes since the last `fill_share`.
        is_full: memory was too small for recordings. All passes run eagerly.
        while_recording: makes a context for each recording, in which nothing else may use the device.
    """

    def __init__(
        self,
        trunk: nn.Module,
        recorder: Recorder,
        *,
        longest: int,
        longest_text: int,
        places: Callable[[], Any] = lambda: None,
    ) -> None:
        """
        Args:
            longest: tokens of the largest micro-batch that is recorded. A larger one runs eagerly.
            longest_text: tokens of the longest text. Attention chooses its kernels by this number.
            places: returns the addresses of weights and gradients. If they change, everything is recorded
                again.
        """
        self._trunk, self._recorder = trunk, recorder
        self._lengths = lengths_up_to(longest)
        self._longest_text = longest_text
        self._places, self._recorded_at = places, places()
        self._recordings: dict[_Kind, _Recording] = {}
        self._seen_once: set[_Kind] = set()
        self.is_full = False
        self._outcome: _Outcome | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._turn = 0
        self.n_tokens = self.n_filled = 0
        self.while_recording: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the last hidden state of every token, `[T, D]`."""
        kind = self._kind(batch)
        if kind is None:
            return seeded_hidden_states(self._trunk, batch)
        seed = drawn_dropout_seed() if kind.training else 0
        self.n_tokens += batch.n_tokens
        self.n_filled += kind.length - batch.n_tokens
        self._turn += 1
        recording = self._recording(kind, batch, seed)
        if recording is None:
            return self._filled(kind, batch, seed)
        recording.inputs.fill(batch, seed)
        if kind.with_gradient:
            replayed: torch.Tensor = _Replayed.apply(self._anchor, self, recording, batch.n_tokens)
            return replayed
        recording.forward()
        return recording.outcome.hidden_LD[: batch.n_tokens].clone()

    def filled(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the same without a recording. Draws the same dropout seed from torch's generator."""
        kind = self._kind(batch)
        assert kind is not None, "the batch is too large to be recorded"
        return self._filled(kind, batch, drawn_dropout_seed() if kind.training else 0)

    def _filled(self, kind: _Kind, batch: PackedBatch, seed: int) -> torch.Tensor:
        inputs = self._inputs(kind.length, batch)
        inputs.fill(batch, seed)
        return self._pass(inputs)[: batch.n_tokens]

    def fill_share(self) -> float:
        """Returns the share of filler in the tokens since the last call, and resets the count.

        0 if nothing ran.
        """
        share = self.n_filled / max(self.n_tokens + self.n_filled, 1)
        self.n_tokens = self.n_filled = 0
        return share

    @property
    def turn(self) -> int:
        """Number of passes so far. A replay overwrites what the pass before has saved for its backward."""
        return self._turn

    def _kind(self, batch: PackedBatch) -> _Kind | None:
        length = length_for(batch.n_tokens, self._lengths)
        if length is None:
            return None
        return _Kind(length, torch.is_grad_enabled(), self._trunk.training)

    def _inputs(self, length: int, batch: PackedBatch) -> StaticInputs:
        return StaticInputs.empty(length, self._longest_text, batch.input_ids.device)

    def _pass(self, inputs: StaticInputs) -> torch.Tensor:
        seeds = Seeds(inputs.seed) if self._trunk.training else None
        return trunk_hidden_states(self._trunk, inputs.fresh_bounds(), seeds)

    def _recording(self, kind: _Kind, batch: PackedBatch, seed: int) -> _Recording | None:
        """Returns the recording for this kind of pass, and makes it if needed.

        None: the pass is not worth a recording, or memory holds no more of them.
        """
        if (places := self._places()) != self._recorded_at:
            log.info("weights have moved: %s recordings are made again", len(self._recordings))
            self._forget()
            self._recorded_at = places
        if kind in self._recordings:
            return self._recordings[kind]
        if self.is_full or not (kind.with_gradient or kind in self._seen_once):
            self._seen_once.add(kind)  # evaluation has many lengths that never come again
            return None
        started = time.perf_counter()
        inputs = self._inputs(kind.length, batch)
        inputs.fill(batch, seed)
        try:
            with self.while_recording():
                record = self._record_both if kind.with_gradient else self._record_forward
                recording = record(inputs)
        except RuntimeError as error:
            self._explain(error, kind.length)
        if self.is_full:  # outside of `except`, because the error holds tensors of the failed pass
            self._forget()
            return None
        self._recordings[kind] = recording
        what = "forward and backward" if kind.with_gradient else "forward"
        log.info("recorded %s of %s tokens, %.1f s", what, kind.length, time.perf_counter() - started)
        return recording

    def _forget(self) -> None:
        """Gives up all recordings, and their memory."""
        self._recordings.clear()
        self._recorder.forget()

    def _explain(self, error: BaseException, length: int) -> None:
        """Handles a failed recording. If memory is full, only recording ends.

        An eager pass needs the memory that the recordings hold. So they go.

        Raises:
            UserError: it failed for another reason.
        """
        chain = chain_of(error)  # the last error is the one that CUDA raised; the first is a consequence
        if any(full_memory(link) for link in chain):
            log.warning("memory is full at %s tokens: from here on passes are not recorded", length)
            self.is_full = True
            return
        words = " ".join(str(chain[-1]).split())[:200]
        what = f"a pass of {length} tokens cannot be recorded ({words})"
        raise UserError(f"{what}: set model.cuda_graphs=off") from error

    def _record_forward(self, inputs: StaticInputs) -> _Recording:
        outcome = self._outcome_of(inputs)

        def forward() -> None:
            outcome.hidden_LD[: inputs.batch.n_tokens].copy_(self._pass(inputs))

        self._recorder.warm_up(forward)
        _, replay = self._recorder.record(forward)
        return _Recording(inputs, outcome, replay, _no_backward)

    def _record_both(self, inputs: StaticInputs) -> _Recording:
        """Records a forward pass and its backward.

        The autograd graph of the recorded forward holds the saved tensors until the backward is recorded.
        """
        trained = [p for p in self._trunk.parameters() if p.requires_grad]
        outcome, length = self._outcome_of(inputs), inputs.batch.n_tokens

        def forward() -> torch.Tensor:
            hidden_LD = self._pass(inputs)
            outcome.hidden_LD[:length].copy_(hidden_LD.detach())
            return hidden_LD

        def backward(hidden_LD: torch.Tensor, factor: float) -> None:
            found = torch.autograd.grad(hidden_LD, trained, outcome.d_hidden_LD[:length], allow_unused=True)
            pairs = [(p.grad, g) for p, g in zip(trained, found, strict=True) if g is not None]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=factor)

        self._recorder.warm_up(lambda: backward(forward(), 0.0))  # factor 0: adds nothing to the gradients
        hidden_LD, replay = self._recorder.record(forward)
        _, replay_backward = self._recorder.record(lambda: backward(hidden_LD, 1.0))
        return _Recording(inputs, outcome, replay, replay_backward)

    def _outcome_of(self, inputs: StaticInputs) -> _Outcome:
        if self._outcome is None:
            with torch.no_grad():
                hidden_LD = self._pass(inputs)
            with torch.inference_mode(False):
                shape = (self._lengths[-1], hidden_LD.shape[-1])
                zeros = [torch.zeros(shape, dtype=hidden_LD.dtype, device=hidden_LD.device) for _ in range(2)]
                self._outcome = _Outcome(*zeros)
        return self._outcome


def _no_backward() -> None:
    raise AssertionError("a pass without gradient has no backward")


class _Replayed(torch.autograd.Function):
    """A replayed pass. `anchor` is the only input with a gradient. It makes autograd call `backward`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, graphed: GraphedTrunk, recording: _Recording, n_tokens: int
    ) -> torch.Tensor:
        ctx.graphed, ctx.recording, ctx.turn = graphed, recording, graphed.turn
        recording.forward()
        return recording.outcome.hidden_LD[:n_tokens].clone()

    @staticmethod
    def backward(ctx: Any, d_hidden_TD: torch.Tensor) -> tuple[None, ...]:
        if ctx.turn != ctx.graphed.turn:
            raise RuntimeError("another pass ran before this one's backward, and overwrote what it had saved")
        # A loss that is still alive must not keep the recording's memory.
        recording, ctx.recording = ctx.recording, None
        n_tokens, length = len(d_hidden_TD), recording.inputs.batch.n_tokens
        d_hidden_LD = recording.outcome.d_hidden_LD
        d_hidden_LD[:n_tokens].copy_(d_hidden_TD)
        d_hidden_LD[n_tokens:length].zero_()  # filler has no gradient
        recording.backward()
        return None, None, None, None
