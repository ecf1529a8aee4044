"""Which tokens of a clip the encoder sees, and which ones it has to tell.

All shapes are one mechanism. Every token draws noise, and starts a block that has this noise as its priority. A token's
score is the highest priority among the blocks that cover it, and the highest scores are masked: so the first block is
masked whole, then the second, until the clip's count is reached exactly, at any ratio and on any grid. Blocks wrap
round the edges of the clip, so all of its tokens are masked equally often. Shapes differ in their blocks alone:
`uniform` has single tokens, `cluster` squares, `time` bands of whole columns, `frequency` bands of whole rows;
`inverse_block` has squares too, but masks the lowest scores, so that blocks are what is kept. A block may have its own
length in time. `one_way_cluster` alone is another mechanism: the sampler of SSAST's published code, biases included.

Axes: B batch, F' x T' grid of tokens, N = F' T' tokens (token f T' + t is in row f, column t), K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.core.options import Options
from ssl_c2f.curriculum.phases import Shape

_BITS = 20  # of each of the three parts of a score, which thus stays inside an int64, and its complement too


class MaskOptions(Options):
    """How masks are drawn."""

    shape: Shape | None = Field(None, description="none: mae uniform, ssast cluster, latent inverse_block")
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # masked share of a clip's valid tokens
    size: tuple[int, int] = (3, 5)  # least and greatest side of a block, or width of a band, in tokens; drawn per clip
    seconds: tuple[float, float] | None = Field(
        None, description="least and greatest length of a block in time, in whole tokens, at least one; none: `size`"
    )

    @field_validator("size")
    @classmethod
    def _ordered(cls, size: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= size[0] <= size[1]:
            raise ValueError("the block's sides must be at least 1, the least one first")
        return size

    @field_validator("seconds")
    @classmethod
    def _positive(cls, seconds: tuple[float, float] | None) -> tuple[float, float] | None:
        if seconds and not 0 < seconds[0] <= seconds[1]:
            raise ValueError("the block's lengths must be above 0, the least one first")
        return seconds


@dataclass(frozen=True)
class Mask:
    """A drawn mask. Tokens that are valid and not masked are kept; padding is neither masked nor counted."""

    kept: Tensor  # (B, K) int64: indices of the kept tokens, ascending; short clips fill up with padding tokens
    kept_valid: Tensor  # (B, K) bool: False where `kept` is such a padding token
    masked: Tensor  # (B, N) bool
    valid: Tensor  # (B, N) bool: False for padding


def num_masked(num_tokens: int, ratio: float) -> int:
    """How many of a clip's valid tokens are masked: at least one, and one is always kept (so a lone token is)."""
    return min(max(round(ratio * num_tokens), 1), max(num_tokens - 1, 0))


def _count(num_tokens: Tensor, ratio: float) -> Tensor:
    """`num_masked` of (B,) int64, where they are: a table would have to be copied to the device for each draw."""
    return (num_tokens.double() * ratio).round().long().clamp(min=1).minimum((num_tokens - 1).clamp(min=0))


def draw_mask(
    keys: Tensor, grid: tuple[int, int], tokens_t: Tensor, shape: Shape, ratio: float, size: tuple[int, int],
    size_t: tuple[int, int] | None = None,
) -> Mask:
    """Draw one mask per clip; a clip's mask depends on its own key and length alone.

    Args:
        keys: (B,) int64, from `draws.key`.
        grid: (F', T').
        tokens_t: (B,) int64 in 1 .. T': the clip's valid columns.
        shape: which blocks are masked, or kept (see the module's docstring).
        ratio: masked share of the valid tokens.
        size: least and greatest side of a block, or width of a band, in tokens.
        size_t: least and greatest length in time, of blocks that are no squares; None: as long as they are high.

    Returns:
        A `Mask` on the keys' device. K is the kept count of a clip without padding, whatever is in the batch.

    Raises:
        ValueError: the ratio is not between 0 and 1, or the grid has a single token.
    """
    rows, columns = grid
    num_tokens = rows * columns
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1")
    if num_tokens < 2:
        raise ValueError("a grid of one token cannot be masked: use smaller patches or a smaller time factor")

    valid = (torch.arange(columns, device=keys.device) < tokens_t[:, None]).repeat(1, rows)
    count = _count(rows * tokens_t, ratio)[:, None]
    if shape == "one_way_cluster":
        score = _one_way_score(keys, grid, tokens_t, count, size, size_t)
    else:
        score = _score(keys, grid, tokens_t, shape, size, size_t)
    score = score.masked_fill(~valid, torch.iinfo(torch.int64).min)
    order = score.argsort(dim=1, descending=True, stable=True)  # of each clip: masked, kept, padding
    rank = torch.arange(num_tokens, device=keys.device)
    masked = torch.zeros_like(valid).scatter(1, order, rank < count)
    # Shorter clips mask no more tokens and keep no more, so these K ranks exist and hold all that is kept.
    num_kept = num_tokens - num_masked(num_tokens, ratio)
    kept = order.gather(1, count + rank[:num_kept]).sort(1).values
    return Mask(kept, valid.gather(1, kept), masked, valid)


def _score(
    keys: Tensor, grid: tuple[int, int], tokens_t: Tensor, shape: Shape, size: tuple[int, int],
    size_t: tuple[int, int] | None,
) -> Tensor:
    """(B, N) int64 that order tokens by block, then by whole row or column inside a band, then singly.

    The scores of padding mean nothing, and those of valid tokens do not depend on them.
    """
    rows, columns = grid
    noise = (draws.uniform(keys, rows * columns) * 2**_BITS).long().view(-1, rows, columns)
    band = noise
    if shape == "time":
        band = noise.amax(1, keepdim=True).expand_as(noise)
    elif shape == "frequency":
        band = noise.amax(2, keepdim=True).expand_as(noise)

    block = band
    height, length = _sides(keys, size, size_t)
    if shape in ("cluster", "inverse_block", "frequency"):
        block = _spread(block.mT, height, size[1], torch.full_like(tokens_t, rows)).mT
    if shape in ("cluster", "inverse_block", "time"):
        block = _spread(block, length, (size_t or size)[1], tokens_t)

    score: Tensor = ((block << 2 * _BITS) | (band << _BITS) | noise).flatten(1)
    return ~score if shape == "inverse_block" else score


def _sides(keys: Tensor, size: tuple[int, int], size_t: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """(B,) height of a clip's blocks along frequency and (B,) their length in time, in tokens."""
    height = size[0] + draws.integers(draws.key("block side", keys), size[1] - size[0] + 1)
    if size_t is None:
        return height, height
    return height, size_t[0] + draws.integers(draws.key("block length", keys), size_t[1] - size_t[0] + 1)


def _one_way_score(
    keys: Tensor, grid: tuple[int, int], tokens_t: Tensor, count: Tensor, size: tuple[int, int],
    size_t: tuple[int, int] | None,
) -> Tensor:
    """(B, N) int64 that order tokens like the sampler of SSAST's code (github.com/YuanGongND/ssast), ratio for count.

    A block grows to later rows and columns only, runs on into the next row at the clip's end, and ends at the last
    token; token 0 is in none. Blocks are taken until one token too many is masked, then the last tokens are let go.
    So low mel rows are masked far less than those in the middle, and the first and the last token never (but where all
    others are).
    """
    rows, columns = grid
    place = torch.arange(rows * columns, device=keys.device)
    length = (rows * tokens_t)[:, None]
    start = (draws.uniform(keys, rows * columns) * 2**_BITS).long()
    height, width = _sides(keys, size, size_t)

    def grow(priority: Tensor, side: Tensor, greatest: int, stride: Tensor) -> Tensor:
        best = priority
        for step in range(1, greatest):
            source = place - step * stride[:, None]
            reached = priority.gather(1, source.clamp(min=0))
            best = torch.where((source >= 0) & (step < side[:, None]), torch.maximum(best, reached), best)
        return best

    block = grow(start, width, (size_t or size)[1], torch.ones_like(tokens_t))
    block = grow(block, height, size[1], tokens_t)  # tokens are numbered inside the clip's own columns here
    block = block.masked_fill((place == 0) | (place >= length), -1)
    last = block.sort(1, descending=True).values.gather(1, count.clamp(max=rows * columns - 1))
    taken = (block >= last) & (block >= 0)
    score = torch.where(taken, 2 * len(place) - place, len(place) - place).masked_fill(place == 0, 0)
    row, column = place // columns, place % columns
    number = row * tokens_t[:, None] + column  # of each token of the grid, inside the clip's own columns
    return score.gather(1, number.clamp(max=len(place) - 1))


def _spread(priority: Tensor, side: Tensor, greatest: int, length: Tensor) -> Tensor:
    """Maximum of (B, X, Y) over the `side` (B,) cells that end at each one along Y, a circle of `length` (B,) cells.

    The windows double in reach, so that even `greatest`, the bound of `side`, takes few steps.
    """
    place = torch.arange(priority.shape[-1], device=priority.device)
    for step in range((greatest - 1).bit_length()):
        reach = 1 << step
        shift = (side - reach).clamp(0, reach)
        source = (place - shift[:, None]) % length[:, None]  # (B, Y)
        priority = torch.maximum(priority, priority.gather(-1, source[:, None].expand_as(priority)))
    return priority
