"""Dropout by masks that are drawn again or are few positions: how often it strikes, and where."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from llm2vec_kernels.row_ops import dropout
from llm2vec_kernels.row_ops.dropout import Masks, add_dropped_, drop, dropped_positions, uniform_of
from llm2vec_kernels.seeds import MADE_AT_ONCE, Seeds, drawn_seed

from tests.support.interpreter import round_bf16_to_nearest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.97])
def test_each_element_is_dropped_with_probability_p(p: float) -> None:
    """The share, and that one strike says nothing of the next: within four standard deviations."""
    torch.manual_seed(0)
    n = 200_000
    struck = torch.zeros(n)
    struck[torch.from_numpy(dropped_positions(n, p))] = 1
    assert abs(float(struck.mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)
    pairs = float((struck[1:] * struck[:-1]).mean())
    assert abs(pairs - p * p) < 4 * math.sqrt(p * p * (1 - p * p) / n)


def test_positions_go_on_where_too_few_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "sqrt", lambda x: -x / 6 + 0.2)  # some ten draws at a time
    torch.manual_seed(0)
    found = dropped_positions(10_000, 0.3)
    assert (found[1:] > found[:-1]).all()
    assert found[-1] < 10_000
    assert abs(len(found) / 10_000 - 0.3) < 0.02


def test_no_element_has_no_position() -> None:
    assert len(dropped_positions(0, 0.3)) == 0
    assert drop(torch.empty(0, 4), 0.3, Masks(0.3).next_for(torch.empty(0, 4))).shape == (0, 4)


def test_many_small_masks_are_parts_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "ELEMENTS_DRAWN", 1000)
    torch.manual_seed(0)
    masks = Masks(0.2)
    parts = [masks.next_for(torch.empty(250)) for _ in range(4)]
    torch.manual_seed(0)
    whole = torch.from_numpy(dropped_positions(1000, 0.2))
    assert torch.equal(torch.cat([part + 250 * i for i, part in enumerate(parts)]), whole)
    assert len(masks.next_for(torch.empty(5000))) > 800  # of what was drawn too little is left


def test_a_seed_fixes_the_masks() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(Masks(0.1).next_for(torch.empty(100, 7)).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("seeds", [None, Seeds(torch.tensor(3))], ids=["positions", "seed"])
@pytest.mark.parametrize("shape", [(7,), (5, 33), (3, 4, 50)], ids=str)
def test_adds_what_stays(shape: tuple[int, ...], seeds: Seeds | None) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(shape) + 1, torch.rand(shape) + 1
    mask = Masks(0.4, seeds).next_for(x)
    dropped = drop(x, 0.4, mask)
    stays = dropped != 0
    assert torch.equal(dropped, x * stays)
    expected = x + y * stays
    out = x.clone()
    assert add_dropped_(out, y.clone(), 0.4, mask) is out
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 500, 3 * 4096 + 17])
def test_triton_drops_the_same_again(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("llm2vec_kernels.row_ops.triton")
    if DEVICE.type == "cpu":
        round_bf16_to_nearest(monkeypatch)
    torch.manual_seed(0)
    x, y = (torch.rand(n, device=DEVICE).to(dtype) + 1 for _ in range(2))
    mask, other = (torch.tensor(2**40 + i, device=DEVICE) for i in (5, 6))
    dropped = triton.drop(x, 0.3, mask)
    stays = dropped != 0
    assert torch.equal(dropped, x * stays)
    out = x.clone()
    assert triton.add_dropped_(out, y, 0.3, mask) is out
    assert torch.equal(out, x + y * stays)
    if n > 1000:
        assert abs(float(stays.float().mean()) - 0.7) < 4 * math.sqrt(0.21 / n)
        # The four words of one random number.
        quarters = stays.float()[:4096].split(1024)
        assert all(abs(float((a * b).mean()) - 0.49) < 0.07 for a, b in pairwise(quarters))
        assert not torch.equal(dropped, triton.drop(x, 0.3, other))


def test_seeds_of_a_pass_follow_from_the_first_which_may_change() -> None:
    first = torch.tensor(7)
    seeds = Seeds(first)
    assert [int(seeds.next()) for _ in range(MADE_AT_ONCE + 2)] == [7 + i for i in range(MADE_AT_ONCE + 2)]
    torch.manual_seed(5)
    drawn = int(drawn_seed(torch.device("cpu")))
    torch.manual_seed(5)
    assert drawn == int(torch.randint(2**62, ()))


def test_hashed_numbers_are_those_of_splitmix64() -> None:
    """The same in Python's integers, which do not wrap around by themselves."""
    word = 2**64 - 1

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & word
        return x ^ (x >> 31)

    seed = 2**61 + 12345
    expected = [(mixed((mixed(seed) + i * 0x9E3779B97F4A7C15) & word) >> 40) / 2**24 for i in range(50)]
    assert uniform_of(torch.tensor(seed), 50).tolist() == expected


def test_hashed_numbers_are_uniform_and_neighbouring_seeds_independent() -> None:
    """The mean of 200,000 and two correlations, within four standard errors."""
    a, b = (uniform_of(torch.tensor(seed), 200_000) - 0.5 for seed in (11, 12))
    error = 1 / math.sqrt(200_000)
    assert abs(float(a.mean())) < 4 * error * math.sqrt(1 / 12)
    for first, second in ((a, b), (a[1:], a[:-1])):
        assert abs(float((first * second).mean()) * 12) < 4 * error
