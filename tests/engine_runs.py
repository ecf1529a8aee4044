"""Training runs in this process: to the end, by one step, or stopped after every step; and hooks that watch them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_c2f.core import distributed
from ssl_c2f.core.signals import Interrupted, Stop
from ssl_c2f.data.front_end import Batch
from ssl_c2f.train import engine
from ssl_c2f.train.engine import open_run
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.state import Run


def go(o: RunOptions, path: Path, stop: Stop | None = None) -> Path:
    """Start or resume a run; returns its folder."""
    engine.run(o, path, stop=stop)
    return path


def one_step(o: RunOptions, path: Path) -> None:
    """Train one more step: a stop that was requested before is obeyed after the next step."""
    with pytest.raises(Interrupted):
        go(o, path, Stop(signal.SIGTERM))


def to_the_end_in_steps(o: RunOptions, path: Path) -> int:
    """Stop the run after every step and resume it, to its end; returns the number of stops."""
    stops = 0
    while True:
        try:
            go(o, path, Stop(signal.SIGTERM))
            return stops
        except Interrupted:
            stops += 1


def open_job(o: RunOptions, path: Path) -> Run:
    """A run before its first phase."""
    return open_run(o, path, distributed.init("cpu"), Stop(), None, None, "pretrain", path.name)


class watch:
    """Record (training mode, output shape) of every call of a kind of module."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def __enter__(self) -> list[tuple[bool, torch.Size]]:
        seen: list[tuple[bool, torch.Size]] = []

        def hook(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
            if isinstance(module, self.kind):
                seen.append((module.training, output.shape))

        self.handle = nn.modules.module.register_module_forward_hook(hook)
        return seen

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@contextmanager
def before(kind: type[nn.Module], look: Callable[[Any, Batch], None]) -> Iterator[None]:
    """Call `look` with every training batch of a kind of objective, before its forward pass."""

    def hook(module: nn.Module, inputs: tuple[Batch, ...]) -> None:
        if isinstance(module, kind) and module.training:
            look(module, inputs[0])

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
