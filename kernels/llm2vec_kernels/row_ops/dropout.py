"""Dropout (Srivastava et al., 2014) by a mask that takes next to no memory until backward.

A mask is a seed, of which random numbers are made again, or (on a CPU) the positions of the dropped elements,
which are few.

Nothing here scales by 1 / (1 − p): the caller has a factor that takes it along.

Shape legend: T rows (or any leading dimensions), D width, N elements, K dropped ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from llm2vec_kernels.devices import runs_triton
from llm2vec_kernels.seeds import Seeds, drawn_seed

ELEMENTS_DRAWN = 2**17
"""At least, at a time: the start of ten operations counts for more than a few thousand random numbers."""


class Masks:
    """Masks of one probability p (0 < p < 1), one after the other.

    They are drawn from torch's default CPU generator, which `torch.manual_seed` sets back; a GPU is not
    waited for. On a CPU the positions of many small masks are drawn at once.

    Args:
        seeds: what masks are made of in place of the generator, on any device.
    """

    def __init__(self, p: float, seeds: Seeds | None = None) -> None:
        self.p = p
        self._seeds = seeds
        self._start = self._end = 0  # of what was drawn and is not used yet, counted in elements
        self._position_K = np.empty(0, dtype=np.int64)

    def next_for(self, x: torch.Tensor) -> torch.Tensor:
        """For a tensor of x's shape: a seed, an int64 scalar on its device, or positions, `[K]` int64."""
        if self._seeds is not None:
            return self._seeds.next()
        if x.device.type == "cpu":
            return self._next_positions(x.numel())
        if x.is_meta:  # shapes of a CPU's
            return x.new_empty(round(x.numel() * self.p), dtype=torch.int64)
        self._seeds = Seeds(drawn_seed(x.device))
        return self._seeds.next()

    def _next_positions(self, n_elements: int) -> torch.Tensor:
        if self._end - self._start < n_elements:
            self._start, self._end = 0, max(n_elements, ELEMENTS_DRAWN)
            self._position_K = dropped_positions(self._end, self.p)
        start, self._start = self._start, self._start + n_elements
        n_taken = self._position_K.searchsorted(self._start)
        taken_K, self._position_K = self._position_K[:n_taken], self._position_K[n_taken:]
        return torch.from_numpy(taken_K - start)


def drop(x_TD: torch.Tensor, p: float, mask: torch.Tensor) -> torch.Tensor:
    """x with zeros where the mask drops, `[T, D]` contiguous."""
    if x_TD.is_cuda and runs_triton(x_TD.device):
        from llm2vec_kernels.row_ops import triton  # here, for machines without Triton

        return triton.drop(x_TD, p, mask)
    return _drop_(x_TD.clone(memory_format=torch.contiguous_format), p, mask)


def add_dropped_(out_TD: torch.Tensor, y_TD: torch.Tensor, p: float, mask: torch.Tensor) -> torch.Tensor:
    """out += y, with zeros where the mask drops; returns `out`.

    Both are contiguous. `y` may be overwritten.
    """
    if y_TD.is_cuda and runs_triton(y_TD.device):
        from llm2vec_kernels.row_ops import triton

        return triton.add_dropped_(out_TD, y_TD, p, mask)
    return out_TD.add_(_drop_(y_TD, p, mask))


def _drop_(x_TD: torch.Tensor, p: float, mask: torch.Tensor) -> torch.Tensor:
    """In place, without Triton."""
    if mask.dim() == 1:
        x_TD.view(-1).index_fill_(0, mask, 0.0)
    elif not x_TD.is_meta:
        x_TD.mul_((uniform_of(mask, x_TD.numel()) >= p).view(x_TD.shape))
    return x_TD


def uniform_of(seed: torch.Tensor, n_elements: int) -> torch.Tensor:
    """`[N]` fp32, uniform in [0, 1), a function of the seed and the element's number alone.

    SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"), whose state
    starts at a hash of the seed. No host reads the seed.
    """
    state_N = _mixed(seed) + torch.arange(n_elements, device=seed.device) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_mixed(state_N), 40).float() / 2**24


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, n_bits: int) -> torch.Tensor:
    """int64 to the right, zeros coming in: torch's own shift repeats the sign."""
    return (x >> n_bits) & (2 ** (64 - n_bits) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def dropped_positions(n_elements: int, p: float) -> np.ndarray:
    """Which of N elements are dropped, each with probability p: `[K]` int64, ascending.

    How many elements stay before the next dropped one is geometric: ⌊log u / log(1 − p)⌋ for u uniform in
    (0, 1] (Devroye, 1986, "Non-uniform random variate generation", chapter X.2). So few random numbers are
    drawn where p is small.
    """
    expected = n_elements * p
    n_draws = int(expected + 6 * math.sqrt(expected) + 8)  # once in 10⁹ times more are needed
    found: list[np.ndarray] = []
    past = 0
    while not found or past < n_elements:
        # NumPy, whose operations start in a third of the time that torch's take.
        gap_K = torch.rand(n_draws).numpy()
        np.subtract(1, gap_K, out=gap_K)  # in (0, 1]
        np.log(gap_K, out=gap_K)
        gap_K *= 1 / math.log1p(-p)
        gap_K += 1
        position_K = gap_K.astype(np.int64)
        np.cumsum(position_K, out=position_K)
        position_K += past - 1
        found.append(position_K)
        past = int(position_K[-1]) + 1
    position_K = found[0] if len(found) == 1 else np.concatenate(found)
    return position_K[: position_K.searchsorted(n_elements)]
