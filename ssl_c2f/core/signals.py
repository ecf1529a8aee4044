"""Signals that ask a run to stop: noted, and obeyed at the next step boundary, or at once where a run waits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_caught: set[signal.Signals] = set()  # while a Stop is listening


class Interrupted(Exception):
    """A signal asked the run to stop; what there was to save was saved first."""

    def __init__(self, signum: int, step: int | None) -> None:
        """`step` is the one that is saved; None: nothing had to be."""
        where = "" if step is None else f" at step {step}, which is saved"
        super().__init__(f"stopped by {signal.Signals(signum).name}{where}; the same command goes on from there")
        self.signum = signum


class Abandoned(Exception):
    """Work that can be repeated later was stopped by a signal."""


@dataclass
class Stop:
    """Set by a signal handler, read at step boundaries, agreed on by all ranks."""

    signum: int = 0
    _listening: bool = False
    _patience: float | None = None  # seconds that the work at hand may go on after a signal; None: to its end

    def check(self) -> None:
        """Raises Abandoned after a signal."""
        if self.signum:
            raise Abandoned

    @contextlib.contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator[None]:
        """Catch the signals, but for a SIGHUP that this process was told to ignore (as nohup does); a second one of a
        kind acts as if nobody listened. A SIGINT that is ignored is caught: jobs of this machine begin like that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in signals}
        if before.get(signal.SIGHUP) == signal.SIG_IGN:
            del before[signal.SIGHUP]

        def handle(number: int, frame: object) -> None:
            self.signum = number
            signal.signal(number, before[signal.Signals(number)])
            self._leave_soon()

        def leave(number: int, frame: object) -> None:
            if self._patience is not None:
                raise Abandoned

        alarm = signal.signal(signal.SIGALRM, leave)
        for number in before:
            signal.signal(number, handle)
        _caught.update(before)
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            _caught.difference_update(before)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.signal(signal.SIGALRM, alarm)

    @contextlib.contextmanager
    def interrupting(self, patience: float = 0.0) -> Iterator[None]:
        """Leave what is done in here `patience` seconds after a signal, wherever it is: it may wait for ever.

        Raises:
            Abandoned: that happened.
        """
        outer, self._patience = self._patience, patience
        try:
            if self.signum and patience:
                self._leave_soon()
            yield
        finally:
            self._patience = outer
            if self._listening:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _leave_soon(self) -> None:
        if self._listening and self._patience is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self._patience, 1e-3))


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
