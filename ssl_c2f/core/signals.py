"""Signals that ask a run to stop: handlers only note them; training stops at the next step boundary."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_caught: set[signal.Signals] = set()  # while a Stop is listening


class Interrupted(Exception):
    """A signal asked the run to stop; it saved a checkpoint first."""

    def __init__(self, signum: int, step: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} at step {step}, which is saved; the same command goes on from there")
        self.signum = signum


class Abandoned(Exception):
    """Work that can be repeated later was stopped by a signal."""


@dataclass
class Stop:
    """Set by a signal handler, read at step boundaries, agreed on by all ranks."""

    signum: int = 0

    def check(self) -> None:
        """Raises Abandoned after a signal."""
        if self.signum:
            raise Abandoned

    @contextlib.contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator[None]:
        """Catch the signals. A second one of a kind has its normal effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in signals}

        def handle(number: int, frame: object) -> None:
            self.signum = number
            signal.signal(number, before[signal.Signals(number)])

        for number in signals:
            signal.signal(number, handle)
        _caught.update(signals)
        try:
            yield
        finally:
            _caught.difference_update(signals)
            for number, handler in before.items():
                signal.signal(number, handler)


def _shield() -> None:
    """In a forked child, that is a loader's worker: only its parent may end it. A terminal, torchrun and Slurm signal
    it as well, and if it died of that it would take the run with it."""
    if _caught:
        signal.pthread_sigmask(signal.SIG_BLOCK, _caught)
        threading.Thread(target=_heed_parent, args=(frozenset(_caught),), daemon=True).start()


def _heed_parent(signals: frozenset[signal.Signals]) -> None:
    while signal.sigwaitinfo(signals).si_pid != os.getppid():
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_shield)
