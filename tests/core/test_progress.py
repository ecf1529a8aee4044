"""The progress of a phase: one live line in a terminal, plain lines in a log."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from ssl_c2f.core.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def go(progress: Progress, clock: list[float], seconds_of_a_step: float = 10.0) -> None:
    """Steps 101 to 110 of a run whose half is done at step 110, the first one slow."""
    clock[0] = 500.0
    for step in range(101, 111):
        loss, done = 0.5 + step / 1000, 0.3 + 0.02 * (step - 100)
        progress.update(step, loss=loss, lr=3e-4, clips_per_second=812.4, wait=0.034, run_done=done)
        clock[0] += seconds_of_a_step


def test_a_log_gets_a_line_now_and_then_with_the_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    with Progress("coarse", 0, 3, start=100, stop=110, console=Console(file=out)) as progress:
        go(progress, clock)
        progress.note("step 110: val/loss 0.1 [not markup]")
    lines = out.getvalue().splitlines()
    facts = "lr 3.0e-04  812 clips/s  waiting 3%"
    assert lines == [  # every 30 s, and the last; time starts after the first step, which compiles
        f"coarse 1/3  101/110  loss 0.6010  {facts}  phase -:--  run -:--",
        f"coarse 1/3  104/110  loss 0.6040  {facts}  phase 1:00  run 5:10",
        f"coarse 1/3  107/110  loss 0.6070  {facts}  phase 0:30  run 4:40",
        f"coarse 1/3  110/110  loss 0.6100  {facts}  phase 0:00  run 4:10",
        "step 110: val/loss 0.1 [not markup]",
    ]


def test_hours_are_told_as_such(clock: list[float]) -> None:
    out = io.StringIO()
    with Progress("fine", 2, 3, start=100, stop=110, console=Console(file=out)) as progress:
        go(progress, clock, seconds_of_a_step=1000)
    assert out.getvalue().splitlines()[1].endswith("phase 2:13:20  run 9:10:00")


def test_a_terminal_has_one_line_that_is_gone_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=160, color_system=None, legacy_windows=False)
    with Progress("coarse", 0, 3, start=100, stop=110, console=terminal) as progress:
        go(progress, clock)
        progress.note("transfer: 33 copied")
        assert progress._live is not None
        progress._live.refresh()
    text = out.getvalue()
    assert "coarse 1/3" in text and "110/110  loss 0.6100" in text and "run 4:10" in text
    shown, _, after = text.rpartition("110/110")
    assert "\x1b[2K" in after and "\n" not in after.partition("\x1b[2K")[2].strip()
    assert any(line.endswith("transfer: 33 copied") for line in shown.splitlines())


def test_other_processes_say_nothing(clock: list[float]) -> None:
    out = io.StringIO()
    for console in (Console(file=out), Console(file=out, force_terminal=True)):
        with Progress("coarse", 0, 3, start=100, stop=110, enabled=False, console=console) as progress:
            go(progress, clock)
            progress.note("hidden")
    assert out.getvalue() == ""
