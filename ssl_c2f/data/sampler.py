"""Which clips make up which batch: a pure function of (seed, samples seen, rank, world size).

Batches run across the ends of epochs, so no clip is dropped and no batch is short.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from ssl_c2f.core import draws
from ssl_c2f.curriculum.phases import Curriculum


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_clips: int, weights: torch.Tensor | None) -> torch.Tensor:
    """(n,) which clips an epoch shows, in order: each once or, with weights, in proportion to them.

    Systematic sampling: of no clip is there one more or less than its weight asks for.
    """
    generator = torch.Generator().manual_seed(draws.seed(seed, epoch, "order"))
    order = torch.randperm(num_clips, generator=generator)
    if weights is None:
        return order
    ends = (weights / weights.sum()).cumsum(0)
    places = (torch.arange(num_clips) + torch.rand(1, generator=generator, dtype=ends.dtype)) / num_clips
    return torch.searchsorted(ends, places).clamp(max=num_clips - 1)[order]


def clip_at(seed: int, position: int, num_clips: int, weights: torch.Tensor | None = None) -> tuple[int, int]:
    """(epoch, clip) of the `position`-th sample of a run; `weights` (n,): how often each clip is drawn, in proportion.
    """
    epoch, offset = divmod(position, num_clips)
    return epoch, int(_order(seed, epoch, num_clips, weights)[offset])


def micro_batches(per_device: int, limit: int | None) -> list[int]:
    """Sizes of the micro-batches of one step on one device: as few as the limit allows, as equal as possible."""
    count = 1 if limit is None else -(-per_device // limit)
    return [per_device * (i + 1) // count - per_device * i // count for i in range(count)]


def positions(
    curriculum: Curriculum, start: int, stop: int, rank: int, world: int, limit: int | None
) -> Iterator[list[int]]:
    """The sample positions of each micro-batch of steps `start` ... `stop` - 1 on one rank, in order.

    A step's samples are split over the ranks in contiguous runs.
    """
    for step in range(start, stop):
        per_device = curriculum.lookup(step)[0].batch_size // world
        first = curriculum.samples(step) + rank * per_device
        for size in micro_batches(per_device, limit):
            yield list(range(first, first + size))
            first += size
