"""Dropout (Srivastava et al., 2014) by a mask that needs almost no memory until backward.

A mask is a seed, from which random numbers are made again. On a CPU, unless the caller gives seeds, it is the
positions of the dropped elements, which are few.

Nothing here scales by 1 / (1 − p). The caller puts this into a factor that it applies anyway.

Shape legend: T rows (or any leading dimensions), D width, N elements, K dropped ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from llm2vec_kernels.devices import runs_triton
from llm2vec_kernels.seeds import Seeds, drawn_seed

ELEMENTS_DRAWN = 2**17
"""Masks are drawn for at least this many elements at a time. Ten operations cost more to start than a few
thousand random numbers cost to draw."""


class Masks:
    """Masks of one probability p (0 < p < 1), one after the other.

    They come from torch's default CPU generator, which `torch.manual_seed` resets. The host does not wait for
    a GPU. On a CPU the positions of many small masks are drawn at once.

    Args:
        seeds: the source of masks instead of the generator, on any device.
    """

    def __init__(self, p: float, seeds: Seeds | None = None) -> None:
        self.p = p
        self._seeds = seeds
        self._start = self._end = 0  # the range of elements that was drawn and is not used yet
        self._position_K = np.empty(0, dtype=np.int64)

    def next_for(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a mask for x's shape: a seed (int64 scalar on its device), or positions `[K]` int64."""
        if self._seeds is not None:
            return self._seeds.next()
        if x.device.type == "cpu":
            return self._next_positions(x.numel())
        if x.is_meta:  # the shape that a CPU's mask has on average
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
    """Returns x with zeros where the mask drops, `[T, D]` contiguous."""
    if x_TD.is_cuda and runs_triton(x_TD.device):
        from llm2vec_kernels.row_ops import triton  # here, for machines without Triton

        return triton.drop(x_TD, p, mask)
    return _drop_(x_TD.clone(memory_format=torch.contiguous_format), p, mask)


def add_dropped_(out_TD: torch.Tensor, y_TD: torch.Tensor, p: float, mask: torch.Tensor) -> torch.Tensor:
    """Computes out += y, with zeros in y where the mask drops, and returns `out`.

    Both are contiguous. `y` may be overwritten.
    """
    if y_TD.is_cuda and runs_triton(y_TD.device):
        from llm2vec_kernels.row_ops import triton

        return triton.add_dropped_(out_TD, y_TD, p, mask)
    return out_TD.add_(_drop_(y_TD, p, mask))


def _drop_(x_TD: torch.Tensor, p: float, mask: torch.Tensor) -> torch.Tensor:
    """Drops in place, without Triton."""
    if mask.dim() == 1:
        x_TD.view(-1).index_fill_(0, mask, 0.0)
    elif not x_TD.is_meta:
        x_TD.mul_((uniform_of(mask, x_TD.numel()) >= p).view(x_TD.shape))
    return x_TD


def uniform_of(seed: torch.Tensor, n_elements: int) -> torch.Tensor:
    """Returns `[N]` fp32, uniform in [0, 1). A number depends on the seed and the element's number alone.

    This is SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"). Its
    state starts at a hash of the seed. The host never reads the seed.
    """
    state_N = _mixed(seed) + torch.arange(n_elements, device=seed.device) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_mixed(state_N), 40).float() / 2**24  # fp32 holds 24 bits exactly


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """The mixing function of SplitMix64."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Shifts int64 to the right and fills with zeros. torch's own shift repeats the sign."""
    return (x >> n_bits) & (2 ** (64 - n_bits) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def dropped_positions(n_elements: int, p: float) -> np.ndarray:
    """Draws which of N elements are dropped, each with probability p: `[K]` int64, ascending.

    The number of elements between two dropped ones is geometric: ⌊log u / log(1 − p)⌋ for u uniform in (0, 1]
    (Devroye, 1986, "Non-uniform random variate generation", chapter X.2). So a small p needs few random
    numbers.
    """
    expected = n_elements * p
    n_draws = int(expected + 6 * math.sqrt(expected) + 8)  # more are needed once in 10⁹ times
    found: list[np.ndarray] = []
    past = 0
    while not found or past < n_elements:
        # NumPy's operations start in a third of the time of torch's.
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
