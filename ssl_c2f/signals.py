"""Signals that ask a run to stop: they are noted, and obeyed at the next step boundary."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


class Interrupted(Exception):
    """A signal asked the run to stop; it saved a checkpoint first."""

    def __init__(self, signum: int, step: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} at step {step}, which is saved; the same command goes on from there")
        self.signum = signum


@dataclass
class Stop:
    """Set by a signal handler, read at step boundaries, agreed on by all ranks."""

    signum: int = 0

    @contextlib.contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator[None]:
        """Catch the signals; a second one of a kind acts as if nobody listened."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in signals}

        def handle(number: int, frame: object) -> None:
            self.signum = number
            signal.signal(number, before[signal.Signals(number)])

        for number in signals:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
