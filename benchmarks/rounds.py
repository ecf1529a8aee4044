"""Timing for the benchmarks: candidates take turns within a round, so what else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Times = dict[str, list[float]]  # seconds per call, one for each round


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | None = None) -> Times:
    """Call everything once to warm up and then once a round, in an order that rotates.

    Seconds are those of the CPU in this process and its threads, which another process's load changes least; on a GPU,
    those of the clock between two synchronisations.
    """
    cuda = device is not None and device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    names = list(work)
    for name in names:
        work[name]()
    times: Times = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = now()
            work[name]()
            times[name].append(now() - began)
    return times


def median(times: Times, name: str) -> float:
    return statistics.median(times[name])


def ratio(times: Times, name: str, base: str) -> float:
    """The median over rounds of what `name` took as a fraction of what `base` took in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
