"""What a trunk must show before its vectors are believed.

Each check runs the trunk on token ids and compares hidden states of one text, computed in two ways. Lengths
lie within and beyond every limit of the miniature's config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.model.hidden_states import trunk_hidden_states
from llm2vec_ds.model.probe.mixing import Call, calls_of, moved_outputs

SHORT, MIDDLE, LONG = 7, 21, 31
"""Within every limit, beyond windows and chunks, beyond all positions that the config names."""
LENGTHS = (5, SHORT, MIDDLE, LONG)
TOLERANCE = 1e-5
"""Of the largest number in a hidden state: some types compute norms and softmax in fp32."""
N_TOKENS = 60


class Differs(Exception):
    """What a trunk does that it must not."""


def hidden_states(trunk: Any, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of each text of one packed stream, `[L, D]`."""
    lengths = [len(row) for row in rows]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    batch = PackedBatch(torch.cat(list(rows)), positions, cu_seqlens, max(lengths), positions >= 0)
    hidden = trunk_hidden_states(trunk, batch.to(next(trunk.parameters()).device))
    return list(hidden.split(lengths))


@dataclass(frozen=True)
class Check:
    """Of one trunk, by texts of `lengths` tokens; numbers that differ by less than `tolerance` of the largest
    are equal."""

    trunk: Any
    lengths: Sequence[int] = LENGTHS
    tolerance: float = TOLERANCE

    @torch.no_grad()
    def all(self, causal: bool) -> None:
        """Bidirectional unless `causal`, and no text depends on its neighbours.

        Raises:
            Differs: what the trunk showed instead.
        """
        rows = self._rows()
        if not causal:
            self.bidirectional(rows[SHORT])
        alone = {n: hidden_states(self.trunk, [row])[0] for n, row in rows.items()}
        self.packed(rows, alone)
        self.padded(rows, alone)

    def _rows(self) -> dict[int, torch.Tensor]:
        """Token ids of one text for each length that the trunk takes."""
        generator = torch.Generator().manual_seed(1)
        rows = {n: torch.randint(3, N_TOKENS, (n,), generator=generator) for n in self.lengths}
        return {n: row for n, row in rows.items() if n < LONG or self._takes(row)}

    def _takes(self, row: torch.Tensor) -> bool:
        """False: the text is longer than a table of learned positions."""
        try:
            hidden_states(self.trunk, [row])
        except (IndexError, RuntimeError):
            return False
        return True

    def bidirectional(self, row: torch.Tensor) -> None:
        """Each part that mixes tokens, by itself: one causal layer among several must not pass."""
        calls = calls_of(self.trunk, lambda: hidden_states(self.trunk, [row]))
        if not sum(self._mixes(call, len(row)) for call in calls):
            raise Differs("no layer lets one token see another")

    def _mixes(self, call: Call, length: int) -> bool:
        moved = moved_outputs(call, length, self.tolerance)
        if moved is None:
            return False
        by_middle, by_last = moved
        middle = length // 2
        before, after = int(by_middle[:middle].sum()), int(by_middle[middle + 1 :].sum())
        if before != after:
            raise Differs(
                f"{call} is not bidirectional: a token moves {after} of the {middle} tokens after it, and "
                f"{before} of the {middle} before it"
            )
        if before == middle and not by_last[0]:
            raise Differs(f"{call} is not bidirectional: its last input does not move its first output")
        return before > 0

    def packed(self, rows: dict[int, torch.Tensor], alone: dict[int, torch.Tensor]) -> None:
        """Beside any neighbour, before it and after it, and again after other texts went through."""
        lengths = list(alone)
        for group in (lengths, lengths[::-1], [*lengths[1:], lengths[0]], lengths[:1], lengths[-1:]):
            for n, found in zip(group, hidden_states(self.trunk, [rows[n] for n in group]), strict=True):
                beside = ", ".join(str(m) for m in group if m != n)
                where = f"beside texts of {beside} tokens" if beside else "after other texts"
                self._compare(found, alone[n], n, f"{where} than alone")

    def padded(self, rows: dict[int, torch.Tensor], alone: dict[int, torch.Tensor]) -> None:
        """Where a trunk takes a padding mask, padding changes nothing."""
        longest, device = max(alone), next(self.trunk.parameters()).device
        for side in ("right", "left"):
            ids = torch.full((len(alone), longest), 2, device=device)
            mask = torch.zeros_like(ids)
            for i, n in enumerate(alone):
                start = longest - n if side == "left" else 0
                ids[i, start : start + n], mask[i, start : start + n] = rows[n].to(device), 1
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            try:
                output = self.trunk(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                )
            except Exception:  # padding is not taken, and nothing here pads
                return
            for i, n in enumerate(alone):
                found = output.last_hidden_state[i][mask[i].bool()]
                self._compare(found, alone[n], n, f"padded {side} than packed")

    @torch.no_grad()
    def own_attention(self) -> None:
        """The trunk computes by our attention what it computes by its own, written out in transformers: what
        it asks for besides the mask (windows, chunks, sinks, caps) is honoured.

        The trunk has its own attention afterwards.

        Raises:
            Differs: what came out otherwise.
        """
        rows = {n: row for n, row in self._rows().items() if n > SHORT}
        ours = {n: hidden_states(self.trunk, [row])[0] for n, row in rows.items()}
        self.trunk.set_attn_implementation("eager")
        for n, found in ours.items():
            ids, positions = rows[n][None], torch.arange(n)[None]
            try:
                output = self.trunk(input_ids=ids, position_ids=positions, use_cache=False)
            except Exception:  # it has no other attention, and every check before was of this one
                return
            own = output.last_hidden_state[0]
            self._compare(own, found, n, "by transformers' own attention than by ours")

    def _compare(self, found: torch.Tensor, right: torch.Tensor, n_tokens: int, how: str) -> None:
        difference = float((found - right).abs().max() / right.abs().max())
        if not difference <= self.tolerance:
            raise Differs(
                f"a text of {n_tokens} tokens has other hidden states {how} ({difference:.1e} of the largest)"
            )
