"""Displays of long work: a live line in a terminal, a plain line now and then in a log file; and tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class _Display:
    """A line redrawn in a terminal while a `with` statement lasts; elsewhere a plain one every `log_seconds`."""

    def __init__(self, title: str, console: Console | None, enabled: bool, log_seconds: float) -> None:
        self.title, self.enabled, self.log_seconds = title, enabled, log_seconds
        self.console = console or Console(stderr=True)
        self._began = self._logged = time.monotonic()
        self._live = progress.Progress(
            progress.TextColumn("{task.description}", style="bold", markup=False), progress.BarColumn(20),
            progress.TextColumn("{task.fields[facts]}", markup=False), console=self.console, refresh_per_second=4,
            transient=True, disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._live.add_task(title, facts="")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, line: str) -> None:
        """Print a line, above the live one if there is one."""
        if self.enabled:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self, done: int, total: int, facts: str, *, log: bool = False) -> None:
        now = time.monotonic()
        if not self._live.disable:
            self._live.update(self._task, completed=done, total=total, facts=facts)
        elif log or now - self._logged >= self.log_seconds:
            self._logged = now
            self.note(f"{self.title}  {facts}")


class Progress(_Display):
    """The display of one phase, to be used in a `with` statement.

    coarse 1/3 ━━━━━━━━━━ 120/2000  loss 0.5412  lr 3.0e-04  812 clips/s  waiting 3 %  phase 1:20  run 12:05
    """

    def __init__(
        self, phase: str, index: int, count: int, *, start: int, stop: int, enabled: bool = True,
        log_seconds: float = 30.0, console: Console | None = None,
    ) -> None:
        """Phase `index` (from 0) of `count`, from step `start` of the run to step `stop`."""
        super().__init__(f"{phase} {index + 1}/{count}", console, enabled, log_seconds)
        self.start, self.stop = start, stop
        self._run_done_at_start: float | None = None

    def update(
        self, step: int, *, loss: float, lr: float, clips_per_second: float, wait: float, run_done: float
    ) -> None:
        """Show that `step` is done.

        `wait` is the fraction of time spent waiting for data; `run_done` the fraction of the whole run's FLOPs that is
        done (steps of different phases take different times, so steps do not predict the run's end).
        """
        is_first = self._run_done_at_start is None
        if self._run_done_at_start is None:  # the first step pays for compilation and warm-up: time starts after it
            self._run_done_at_start, self.start, self._began = run_done, step, time.monotonic()
        elapsed = time.monotonic() - self._began
        phase_left = _left(elapsed, step - self.start, self.stop - step)
        run_left = _left(elapsed, run_done - self._run_done_at_start, 1 - run_done)
        facts = (
            f"{step}/{self.stop}  loss {loss:.4f}  lr {lr:.1e}  {clips_per_second:.0f} clips/s  "
            f"waiting {wait:.0%}  phase {phase_left}  run {run_left}"
        )
        self._show(step, self.stop, facts, log=is_first or step == self.stop)


class Count(_Display):
    """The display of other work that takes long: how many of how many are done.

    reading recordings ━━━━━━━━━━ 120/400  35/s  0:08 left
    """

    def __init__(self, title: str, *, log_seconds: float = 30.0, console: Console | None = None) -> None:
        super().__init__(title, console, True, log_seconds)

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        self._show(done, total, f"{done}/{total}  {done / elapsed:.3g}/s  {_left(elapsed, done, total - done)} left")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], console: Console | None = None) -> None:
    """Print a table: drawn in a terminal that is wide enough, columns padded with spaces elsewhere."""
    console = console or Console()
    cells = [[str(cell) for cell in row] for row in rows]
    drawn = Table(*columns, title=Text(title), title_justify="left")
    for row in cells:
        drawn.add_row(*map(Text, row))
    width = Measurement.get(console, console.options.update(max_width=10_000), drawn).maximum
    if not console.is_terminal or width > console.width:
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [columns, *cells]]
        console.print("\n".join([title, *lines]), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(drawn)


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _left(elapsed: float, done: float, left: float) -> str:
    """The time that `left` will take if `done` took `elapsed` seconds."""
    return duration(elapsed / done * max(left, 0.0)) if done > 0 else "-:--"
