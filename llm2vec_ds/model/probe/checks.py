"""The checks that a trunk must pass before its vectors are trusted.

Each check runs the trunk on token ids and compares hidden states of one text, computed in two ways. Some
texts are shorter and some are longer than every limit in the miniature's config.
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
"""Lengths within every limit, beyond windows and chunks, and beyond all positions of the config."""
LENGTHS = (5, SHORT, MIDDLE, LONG)
TOLERANCE = 1e-5
"""Largest allowed difference, relative to the largest number in a hidden state. It is above the precision of
fp64, because some types compute norms and softmax in fp32."""
N_TOKENS = 60


class Differs(Exception):
    """A trunk failed a check. The message says how."""


def hidden_states(trunk: Any, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Packs the texts into one stream. Returns the hidden states of each text, `[L, D]`."""
    lengths = [len(row) for row in rows]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    batch = PackedBatch(torch.cat(list(rows)), positions, cu_seqlens, max(lengths), positions >= 0)
    hidden = trunk_hidden_states(trunk, batch.to(next(trunk.parameters()).device))
    return list(hidden.split(lengths))


@dataclass(frozen=True)
class Check:
    """Checks one trunk with texts of `lengths` tokens.

    Numbers count as equal if they differ by at most `tolerance` times the largest one.
    """

    trunk: Any
    lengths: Sequence[int] = LENGTHS
    tolerance: float = TOLERANCE

    @torch.no_grad()
    def all(self, causal: bool) -> None:
        """Checks that the trunk is bidirectional (unless `causal`) and that texts do not affect each other.

        Raises:
            Differs: a check failed.
        """
        rows = self._rows()
        if not causal:
            self.bidirectional(rows[SHORT])
        alone = {n: hidden_states(self.trunk, [row])[0] for n, row in rows.items()}
        self.packed(rows, alone)
        self.padded(rows, alone)

    def _rows(self) -> dict[int, torch.Tensor]:
        """Returns token ids of one text for each length that the trunk takes."""
        generator = torch.Generator().manual_seed(1)
        rows = {n: torch.randint(3, N_TOKENS, (n,), generator=generator) for n in self.lengths}
        return {n: row for n, row in rows.items() if n < LONG or self._takes(row)}

    def _takes(self, row: torch.Tensor) -> bool:
        """Returns False if the text is longer than the trunk's table of learned positions."""
        try:
            hidden_states(self.trunk, [row])
        except (IndexError, RuntimeError):
            return False
        return True

    def bidirectional(self, row: torch.Tensor) -> None:
        """Checks each part that mixes tokens by itself. So one causal layer among several is found."""
        calls = calls_of(self.trunk, lambda: hidden_states(self.trunk, [row]))
        if not sum(self._mixes(call, len(row)) for call in calls):
            raise Differs("no layer lets one token see another")

    def _mixes(self, call: Call, length: int) -> bool:
        """Says whether a part lets tokens see each other. Raises Differs if it does so in one direction."""
        moved = moved_outputs(call, length, self.tolerance)
        if moved is None:
            return False
        by_middle, by_last = moved
        middle = length // 2
        before, after = int(by_middle[:middle].sum()), int(by_middle[middle + 1 :].sum())
        if before != after:
            raise Differs(
                f"{call} is not bidirectional: a token affects {after} of the {middle} tokens after it, and "
                f"{before} of the {middle} before it"
            )
        if before == middle and not by_last[0]:
            raise Differs(f"{call} is not bidirectional: its last input does not affect its first output")
        return before > 0

    def packed(self, rows: dict[int, torch.Tensor], alone: dict[int, torch.Tensor]) -> None:
        """Checks that a text gets the same hidden states beside any neighbours and after other texts."""
        lengths = list(alone)
        for group in (lengths, lengths[::-1], [*lengths[1:], lengths[0]], lengths[:1], lengths[-1:]):
            for n, found in zip(group, hidden_states(self.trunk, [rows[n] for n in group]), strict=True):
                beside = ", ".join(str(m) for m in group if m != n)
                where = f"beside texts of {beside} tokens" if beside else "after other texts"
                self._compare(found, alone[n], n, f"{where} than alone")

    def padded(self, rows: dict[int, torch.Tensor], alone: dict[int, torch.Tensor]) -> None:
        """Checks that padding changes nothing, if the trunk takes a padding mask."""
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
            except Exception:  # the trunk takes no padding, and this toolkit does not pad
                return
            for i, n in enumerate(alone):
                found = output.last_hidden_state[i][mask[i].bool()]
                self._compare(found, alone[n], n, f"padded {side} than packed")

    @torch.no_grad()
    def own_attention(self) -> None:
        """Checks that our attention gives the same as the trunk's own attention in transformers.

        So our attention does all that the trunk asks for besides the mask: windows, chunks, sinks, caps. The
        trunk has its own attention afterwards.

        Raises:
            Differs: the hidden states differ.
        """
        rows = {n: row for n, row in self._rows().items() if n > SHORT}
        ours = {n: hidden_states(self.trunk, [row])[0] for n, row in rows.items()}
        self.trunk.set_attn_implementation("eager")
        for n, found in ours.items():
            ids, positions = rows[n][None], torch.arange(n)[None]
            try:
                output = self.trunk(input_ids=ids, position_ids=positions, use_cache=False)
            except Exception:  # the trunk has no other attention, so the earlier checks were of its own
                return
            own = output.last_hidden_state[0]
            self._compare(own, found, n, "by transformers' own attention than by ours")

    def _compare(self, found: torch.Tensor, right: torch.Tensor, n_tokens: int, how: str) -> None:
        difference = float((found - right).abs().max() / right.abs().max())
        if not difference <= self.tolerance:
            raise Differs(
                f"a text of {n_tokens} tokens has different hidden states {how} ({difference:.1e} of the "
                "largest)"
            )
