"""Masks of every shape: counts, uniform coverage, contiguity, and independence of the rest of the batch."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.curriculum.phases import Shape
from ssl_c2f.data.masks import Mask, MaskOptions, _count, _spread, draw_mask, num_masked

SHAPES = get_args(Shape)
GRIDS = [(8, 16), *(pytest.param(grid, marks=pytest.mark.slow) for grid in [(8, 64), (1, 512)])]
shapes = pytest.mark.parametrize("shape", SHAPES)
fair = pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "one_way_cluster"])
settings = hypothesis_settings(max_examples=60, deadline=None)
grids = st.tuples(st.integers(1, 6), st.integers(1, 24)).filter(lambda grid: grid[0] * grid[1] > 1)
ratios = st.floats(0, 1, exclude_min=True, exclude_max=True)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda pair: (min(pair), max(pair)))


@settings
@given(ratio=ratios)
def test_counts_on_a_device_are_those_of_python(ratio: float) -> None:
    tokens = torch.arange(600)
    assert _count(tokens, ratio).tolist() == [num_masked(n, ratio) for n in tokens.tolist()]


def draw(
    shape: Shape, grid: tuple[int, int], tokens_t: int | Tensor, *, clips: int = 1, ratio: float = 0.75,
    size: tuple[int, int] = (3, 5), seed: int = 0, size_t: tuple[int, int] | None = None,
) -> Mask:
    if isinstance(tokens_t, int):
        tokens_t = torch.full((clips,), tokens_t)
    return draw_mask(draws.key(seed, torch.arange(len(tokens_t))), grid, tokens_t, shape, ratio, size, size_t)


@settings
@given(shape=st.sampled_from(SHAPES), grid=grids, ratio=ratios, size=sizes, seed=st.integers(0, 999))
def test_counts_are_exact_at_every_length(
    shape: Shape, grid: tuple[int, int], ratio: float, size: tuple[int, int], seed: int
) -> None:
    rows, columns = grid
    mask = draw(shape, grid, torch.arange(1, columns + 1), ratio=ratio, size=size, seed=seed)
    assert mask.kept.shape == (columns, rows * columns - num_masked(rows * columns, ratio))
    assert (mask.kept.diff(dim=1) > 0).all()
    for length, kept, kept_valid, masked, valid in zip(
        range(1, columns + 1), mask.kept, mask.kept_valid, mask.masked, mask.valid, strict=True
    ):
        assert valid.view(grid).sum(1).tolist() == [length] * rows
        assert masked.sum() == num_masked(rows * length, ratio)
        assert not (masked & ~valid).any()
        assert torch.equal(kept[kept_valid], (valid & ~masked).nonzero()[:, 0])
        assert not valid[kept[~kept_valid]].any()


@settings
@given(num_tokens=st.integers(2, 5000), ratio=ratios)
def test_some_tokens_are_masked_and_some_kept(num_tokens: int, ratio: float) -> None:
    count = num_masked(num_tokens, ratio)
    assert 1 <= count <= num_tokens - 1
    assert abs(count - ratio * num_tokens) <= 1
    assert count <= num_masked(num_tokens + 1, ratio) <= count + 1  # so a shorter clip masks and keeps no more


@settings
@given(shape=st.sampled_from(SHAPES), data=st.data())
def test_a_clip_does_not_depend_on_the_rest_of_the_batch(shape: Shape, data: st.DataObject) -> None:
    tokens_t = torch.tensor(data.draw(st.lists(st.integers(1, 16), min_size=2, max_size=6)))
    keys = draws.key(data.draw(st.integers(0, 999)), torch.arange(len(tokens_t)))
    batch = draw_mask(keys, (4, 16), tokens_t, shape, 0.7, (2, 4))
    for i in range(len(tokens_t)):
        alone = draw_mask(keys[i : i + 1], (4, 16), tokens_t[i : i + 1], shape, 0.7, (2, 4))
        assert torch.equal(alone.masked[0], batch.masked[i])
        assert torch.equal(alone.kept[0], batch.kept[i])


@settings
@given(length=st.integers(1, 12), side=st.integers(1, 15), seed=st.integers(0, 999))
def test_blocks_spread_round_the_circle(length: int, side: int, seed: int) -> None:
    priority = torch.randint(100, (1, 2, 12), generator=torch.Generator().manual_seed(seed))
    spread = _spread(priority, torch.tensor([side]), 15, torch.tensor([length]))
    for row, result in zip(priority[0].tolist(), spread[0].tolist(), strict=True):
        for t in range(length):
            assert result[t] == max(row[(t - i) % length] for i in range(side))


@fair
@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_are_masked_equally_often_and_blocks_hold_together(shape: Shape, grid: tuple[int, int]) -> None:
    masks = [draw(shape, grid, grid[1], clips=2500, seed=seed).masked for seed in range(4)]  # 10,000 draws
    masked = torch.cat(masks).view(-1, *grid)
    share = masked.float().mean(0)
    assert (share.mean(1) - 0.75).abs().max() < 0.02  # of each mel row
    assert (share.mean(0) - 0.75).abs().max() < 0.02  # of each column of frames
    if shape != "uniform" and not (shape == "frequency" and grid[0] == 1):  # one row leaves no choice of rows
        assert contiguity(masked) > 0.75 + 0.02
    else:
        assert contiguity(masked) == pytest.approx(0.75, abs=0.005)


def contiguity(masked: Tensor) -> float:
    """Share of the neighbours (above, below, left, right) of masked tokens that are masked too."""
    pairs = [(masked[:, 1:], masked[:, :-1]), (masked[:, :, 1:], masked[:, :, :-1])]
    both = sum(int((a & b).sum()) for a, b in pairs)
    return 2 * both / sum(int(a.sum() + b.sum()) for a, b in pairs)


@fair
def test_short_clips_are_masked_equally_often_too(shape: Shape) -> None:
    masked = draw(shape, (4, 16), 9, clips=10_000).masked.view(-1, 4, 16)
    share = masked.float().mean(0)
    assert (share[:, :9] - 0.75).abs().max() < 0.02
    assert not share[:, 9:].any()


@shapes
@pytest.mark.parametrize("grid", [(8, 32), (8, 16), (1, 256), (1, 128)])
def test_a_coarse_grid_is_masked_at_the_published_share(shape: Shape, grid: tuple[int, int]) -> None:
    """400 of 512 patches is what SSAST masks; as a number of patches it would never be reached here."""
    masked = draw(shape, grid, grid[1], clips=200, ratio=400 / 512).masked
    assert masked.sum(1).tolist() == [round(grid[0] * grid[1] * 400 / 512)] * 200


def published_mask(count: int, rows: int, columns: int, sides: tuple[int, int], dice: random.Random) -> list[int]:
    """SSAST's sampler as its code is described: one block after the other, until there is one token too many."""
    found: set[int] = set()
    side = dice.randint(*sides)
    while len(found) <= count:
        start = dice.randrange(rows * columns)
        block = {start + down * columns + along for down in range(side) for along in range(side)}
        found |= block & set(range(1, rows * columns))
    return sorted(found)[:count]


@pytest.mark.parametrize(("grid", "count"), [((8, 64), 400), ((4, 16), 20)])
def test_one_way_clusters_have_the_biases_of_the_published_sampler(grid: tuple[int, int], count: int) -> None:
    dice, clips, tokens = random.Random(0), 400, grid[0] * grid[1]
    expected = torch.zeros(tokens)
    for _ in range(clips):
        expected[published_mask(count, *grid, (3, 5), dice)] += 1 / clips
    masked = draw("one_way_cluster", grid, grid[1], clips=2500, ratio=count / tokens).masked.float()
    assert masked.sum(1).unique().tolist() == [count]
    found = masked.mean(0)
    assert (found - expected).abs().max() < 0.12
    rows, wanted = (share.view(grid).mean(1) for share in (found, expected))
    assert (rows - wanted).abs().max() < 0.02
    assert found[0] == found[-1] == 0
    if grid == (8, 64):
        assert rows[0] == pytest.approx(0.42, abs=0.02) and rows.max() == pytest.approx(0.88, abs=0.02)
    assert contiguity(masked.view(-1, *grid).bool()) > count / tokens + 0.02


def test_one_way_clusters_of_a_short_clip_are_those_of_a_short_grid() -> None:
    """All of its tokens but the first and the last may be masked, and nothing else ever is."""
    share = draw("one_way_cluster", (4, 16), 9, clips=3000, ratio=0.5).masked.view(-1, 4, 16).float().mean(0)
    alone = draw("one_way_cluster", (4, 9), 9, clips=3000, ratio=0.5, seed=1).masked.view(-1, 4, 9).float().mean(0)
    assert (share[:, :9] - alone).abs().max() < 0.06
    assert not share[:, 9:].any()


@settings
@given(
    shape=st.sampled_from(["cluster", "inverse_block", "one_way_cluster"]), height=st.integers(1, 4),
    length=st.integers(1, 8), seed=st.integers(0, 999),
)
def test_blocks_have_a_length_of_their_own(shape: Shape, height: int, length: int, seed: int) -> None:
    """As many tokens as one block has: what is masked (or kept) is one."""
    share = height * length / 160
    masked = draw(
        shape, (8, 20), 20, seed=seed, size=(height, height), size_t=(length, length),
        ratio=1 - share if shape == "inverse_block" else share,
    ).masked.view(8, 20)
    block = ~masked if shape == "inverse_block" else masked
    if shape != "one_way_cluster":  # its first block may be cut short at an end
        assert (int(block.any(1).sum()), int(block.any(0).sum())) == (height, length)
    square = draw(shape, (8, 20), 20, seed=seed, size=(height, height), ratio=0.5).masked
    same = draw(shape, (8, 20), 20, seed=seed, size=(height, height), size_t=(height, height), ratio=0.5).masked
    assert torch.equal(square, same)


def test_tokens_are_numbered_along_time_first() -> None:
    mask = draw("time", (4, 6), 5, ratio=0.4, size=(2, 2))  # masks 8 of 20 valid tokens: two columns of four
    assert mask.valid.view(4, 6).tolist() == [[True] * 5 + [False]] * 4
    first, second = columns = mask.masked.view(4, 6).all(0).nonzero()[:, 0].tolist()
    assert second - first in (1, 4)  # neighbours on a circle of five
    kept = {6 * row + column for row in range(4) for column in range(5) if column not in columns}
    assert set(mask.kept[mask.kept_valid].tolist()) == kept
    assert set(mask.kept[~mask.kept_valid].tolist()) < {5, 11, 17, 23}


def test_bands_are_whole_but_for_the_last_line() -> None:
    rows = draw("frequency", (8, 64), 64, clips=50).masked.view(-1, 8, 64).float().mean(2)
    assert ((rows == 0) | (rows == 1)).sum(1).min() >= 7
    columns = draw("time", (8, 64), 64, clips=50, ratio=0.7).masked.view(-1, 8, 64).float().mean(1)
    assert ((columns == 0) | (columns == 1)).sum(1).min() >= 63


@pytest.mark.parametrize(("shape", "inside"), [("cluster", True), ("inverse_block", False)])
def test_the_first_block_is_a_square(shape: Shape, inside: bool) -> None:
    """9 tokens and blocks of 3 x 3: all that is masked (or kept) is one block, round the edges if need be."""
    masked = draw(shape, (8, 16), 16, clips=50, size=(3, 3), ratio=9 / 128 if inside else 119 / 128).masked
    block = (masked == inside).view(-1, 8, 16)
    assert block.any(2).sum(1).tolist() == block.any(1).sum(1).tolist() == [3] * 50


@shapes
def test_runs_where_the_keys_are(shape: Shape) -> None:
    """The meta device refuses tensors of any other, as a GPU does."""
    keys = torch.empty(3, dtype=torch.int64, device="meta")
    mask = draw_mask(keys, (4, 16), torch.ones_like(keys), shape, 0.75, (3, 5))
    assert {t.device.type for t in (mask.kept, mask.kept_valid, mask.masked, mask.valid)} == {"meta"}


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_impossible_ratios(ratio: float) -> None:
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        draw("uniform", (8, 8), 8, ratio=ratio)
    with pytest.raises(ValidationError, match="ratio"):
        MaskOptions(ratio=ratio)


def test_impossible_grid_and_sizes() -> None:
    with pytest.raises(ValueError, match="grid of one token"):
        draw("uniform", (1, 1), 1)
    for size in [(0, 3), (5, 3)]:
        with pytest.raises(ValidationError, match="at least 1, the least one first"):
            MaskOptions(size=size)
    for seconds in [(0.0, 0.3), (0.5, 0.3)]:
        with pytest.raises(ValidationError, match="above 0, the least one first"):
            MaskOptions(seconds=seconds)
