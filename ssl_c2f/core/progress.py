"""How a phase is getting on: one live line in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class _LiveLine:
    """A line that is redrawn in a terminal while a `with` statement lasts; nothing elsewhere."""

    def __init__(self, console: Console | None, enabled: bool = True) -> None:
        self.console = console or Console(stderr=True)
        self._live: Live | None = None
        if enabled and self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


class Progress(_LiveLine):
    """The display of one phase, to be used in a `with` statement.

    coarse 1/3 ━━━━━━━━━━ 120/2000  loss 0.5412  lr 3.0e-04  812 clips/s  waiting 3 %  phase 1:20  run 12:05
    """

    def __init__(
        self,
        phase: str,
        index: int,
        count: int,
        *,
        start: int,
        stop: int,
        enabled: bool = True,
        log_seconds: float = 30.0,
        console: Console | None = None,
    ) -> None:
        """Phase `index` (from 0) of `count`; it goes on at step `start` of the run and ends at `stop`."""
        super().__init__(console, enabled)
        self.title = f"{phase} {index + 1}/{count}"
        self.start, self.stop = start, stop
        self.enabled, self.log_seconds = enabled, log_seconds
        self._began = time.monotonic()
        self._shown = float("-inf")
        self._run_done_at_start: float | None = None

    def update(
        self, step: int, *, loss: float, lr: float, clips_per_second: float, wait: float, run_done: float
    ) -> None:
        """Show that `step` is done.

        `wait` is the share of time spent waiting for data; `run_done` the share of the whole run's FLOPs that is done
        (steps of different phases take different times, so the run's end is not to be had from steps).
        """
        now = time.monotonic()
        if self._run_done_at_start is None:  # the first step pays for compilation and warm-up: time starts after it
            self._run_done_at_start, self.start, self._began = run_done, step, now
        elapsed = now - self._began
        phase_left = _left(elapsed, step - self.start, self.stop - step)
        run_left = _left(elapsed, run_done - self._run_done_at_start, 1 - run_done)
        facts = (
            f"{step}/{self.stop}  loss {loss:.4f}  lr {lr:.1e}  {clips_per_second:.0f} clips/s  "
            f"waiting {wait:.0%}  phase {phase_left}  run {run_left}"
        )
        if self._live is not None:
            row = Table.grid(padding=(0, 1))
            row.add_row(Text(self.title, style="bold"), ProgressBar(self.stop, step, width=20), Text(facts))
            self._live.update(row)
        elif self.enabled and (step == self.stop or now - self._shown >= self.log_seconds):
            self._shown = now
            self.note(f"{self.title}  {facts}")

    def note(self, line: str) -> None:
        """Print a line, above the live one if there is one."""
        if self.enabled:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Count(_LiveLine):
    """How far some long work is: a live line in a terminal; elsewhere a plain one every `log_seconds`.

    reading recordings  120/400  35/s  0:08 left
    """

    def __init__(self, title: str, *, log_seconds: float = 30.0, console: Console | None = None) -> None:
        super().__init__(console)
        self.title, self.log_seconds = title, log_seconds
        self._began = self._shown = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        now = time.monotonic()
        elapsed = max(now - self._began, 1e-9)
        line = f"{self.title}  {done}/{total}  {done / elapsed:.3g}/s  {_left(elapsed, done, total - done)} left"
        if self._live is not None:
            self._live.update(Text(line))
        elif now - self._shown >= self.log_seconds:
            self._shown = now
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


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


def _left(elapsed: float, done: float, left: float) -> str:
    """The time that `left` will take if `done` took `elapsed` seconds, as h:mm:ss or m:ss."""
    if done <= 0:
        return "-:--"
    seconds = round(elapsed / done * max(left, 0.0))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
