"""Counter-based random draws: what they depend on, and that they look random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_c2f.core import draws

words = st.integers(-(2**63), 2**63 - 1)


def splitmix64(state: int) -> int:
    """The published finaliser, in unbounded integers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(parts=st.lists(words, max_size=4), n=st.integers(0, 5))
def test_equals_splitmix64(parts: list[int], n: int) -> None:
    state = 0
    for part in parts:
        state = splitmix64(state * 31 + part + 0x9E3779B97F4A7C15)
    key = draws.key(*parts)
    assert int(key) % 2**64 == state
    expected = [(splitmix64(state + i * 0x9E3779B97F4A7C15) >> 40) / 2**24 for i in range(1, n + 1)]
    assert draws.uniform(key, n).tolist() == expected


def test_is_frozen() -> None:
    """Runs are reproduced and resumed by these numbers: they never change."""
    assert int(draws.key(0, 1, "crop")) == -7451165369849596155
    assert draws.uniform(draws.key(7), 2).tolist() == [0.7215081453323364, 0.6497042775154114]
    assert int(draws.integers(draws.key(7), 1000)) == 19
    assert draws.seed(3, "step") == 7712080973433522365


@given(seed=words, clips=st.lists(words, min_size=1, max_size=5))
def test_a_clip_does_not_depend_on_the_rest_of_the_batch(seed: int, clips: list[int]) -> None:
    keys = draws.key(seed, torch.tensor(clips), "mask")
    high = torch.arange(1, len(clips) + 1)
    for i, clip in enumerate(clips):
        alone = draws.key(seed, clip, "mask")
        assert keys[i] == alone
        assert torch.equal(draws.uniform(keys, 3)[i], draws.uniform(alone, 3))
        assert draws.integers(keys, high)[i] == draws.integers(alone, int(high[i]))


@given(parts=st.lists(words, min_size=1, max_size=3), high=st.integers(1, 2**31))
def test_numbers_are_drawn_as_tensors_are(parts: list[int], high: int) -> None:
    expected = int(draws.integers(draws.key(*parts, "crop"), high))
    assert draws.integer(high, *parts, "crop") == expected
    assert draws.integer(high, torch.tensor(parts[0]), *parts[1:], "crop") == expected


def test_keys_broadcast() -> None:
    keys = draws.key(torch.arange(3)[:, None], 5, torch.arange(4))
    assert keys.shape == (3, 4) and keys.dtype == torch.int64
    assert draws.uniform(keys, 7).shape == (3, 4, 7)
    assert draws.integers(keys, 10).shape == (3, 4)


def test_every_part_counts() -> None:
    keys = [draws.key(*parts) for parts in [(), (0,), (0, 0), (1, 2), (2, 1), ("a",), ("b",), ("a", 0), (0, "a")]]
    assert len({int(key) for key in keys}) == len(keys)
    grid = draws.key(torch.arange(300)[:, None], torch.arange(300))
    assert len(set(grid.flatten().tolist())) == grid.numel()


def test_keys_stay_on_the_device_of_their_tensors() -> None:
    """The meta device refuses tensors of any other, as a GPU does."""
    clips = torch.empty(3, dtype=torch.int64, device="meta")
    keys = draws.key(0, clips, "mask", 1)
    assert keys.device.type == draws.uniform(keys, 2).device.type == draws.integers(keys, 9).device.type == "meta"


@pytest.mark.parametrize("along", ["counter", "key"])
def test_uniform_is_flat_and_uncorrelated(along: str) -> None:
    n = 1_000_000
    keys = draws.key(1, torch.arange(1 if along == "counter" else n))
    x = draws.uniform(keys, n // len(keys)).flatten().double()
    assert x.min() >= 0 and x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 155  # chi-square, 99 degrees of freedom: p = 0.0003
    for lag in (1, 2, 3, 8, 64):
        assert abs(torch.corrcoef(torch.stack((x[lag:], x[:-lag])))[0, 1]) < 4 / n**0.5


def test_integers_are_flat_below_their_own_bound() -> None:
    high = torch.arange(1, 9).repeat_interleave(20_000)
    x = draws.integers(draws.key(2, torch.arange(len(high))), high)
    for bound, values in zip(range(1, 9), x.view(8, -1), strict=True):
        share = torch.bincount(values, minlength=bound) / values.numel()
        assert len(share) == bound and (share - 1 / bound).abs().max() < 0.015


@given(parts=st.lists(st.one_of(words, st.text(max_size=3)), max_size=3))
def test_seeds_suit_a_generator(parts: list[int | str]) -> None:
    seed = draws.seed(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)
