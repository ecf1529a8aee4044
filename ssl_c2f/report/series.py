"""metrics.jsonl as columns, and curves with few enough points for a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_c2f import track
from ssl_c2f.core.files import read_bytes, read_jsonl

Column = npt.NDArray[np.float64]

# the axes of curves and how the page names them; tokens are left out, since they grow much as FLOPs do
AXES = dict(zip(track.AXES, ("compute", "clips seen", "training time"), strict=False))
POINTS = 500  # of a curve: no screen shows more


@dataclass(frozen=True)
class Log:
    """The records of a run in their order."""

    records: list[dict[str, Any]]
    broken: int = 0  # lines that are no JSON objects, such as the last one of a run that was killed
    _columns: dict[str, Column] = field(default_factory=dict)

    @cached_property
    def phases(self) -> list[str]:
        """Names of the phases in the order of their first record."""
        return list(dict.fromkeys(str(r["phase"]) for r in self.records if "phase" in r))

    @cached_property
    def phase_index(self) -> npt.NDArray[np.int64]:
        """(records,) the index in `phases` of each record's phase, -1 without one."""
        index = {name: i for i, name in enumerate(self.phases)}
        return np.array([index.get(str(r.get("phase")), -1) for r in self.records], dtype=np.int64)

    def column(self, name: str) -> Column:
        """(records,) values of a metric; NaN where a record has no such number."""
        if name not in self._columns:
            values = (record.get(name) for record in self.records)
            self._columns[name] = np.array([v if is_number(v) else np.nan for v in values], dtype=np.float64)
        return self._columns[name]

    @cached_property
    def names(self) -> list[str]:
        """All metrics of any record."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def last(self, phase: str, name: str) -> float | None:
        """The last value of a metric in a phase."""
        values = (record.get(name) for record in reversed(self.records) if record.get("phase") == phase)
        return next((float(value) for value in values if is_number(value)), None)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_log(file: Path) -> Log:
    """Read what is readable; a file that is not there is an empty log."""
    records = read_jsonl(file)
    return Log(records, len(read_bytes(file).splitlines()) - len(records))


def tokens_per_step(log: Log) -> Column:
    """(records,) tokens that the encoder saw per step, averaged over the steps since the record before."""
    step, tokens = log.column("step"), log.column("tokens")
    steps, seen = np.diff(step, prepend=0.0), np.diff(tokens, prepend=0.0)
    return np.where(steps > 0, seen / np.where(steps > 0, steps, 1.0), np.nan)


def curve(log: Log, values: Column, points: int = POINTS) -> dict[str, list[float]] | None:
    """A column against every axis, as means of up to `points` intervals, none of which crosses a phase boundary.

    A mean stands at its interval's end. Where an interval holds several records, "low" and "high" are its least and
    greatest values. None if there is no finite value.
    """
    axes = {axis: log.column(axis) for axis in AXES}
    rows = np.flatnonzero(np.isfinite(values) & np.all([np.isfinite(axis) for axis in axes.values()], axis=0))
    if not len(rows):
        return None
    interval = np.arange(len(rows)) * min(points, len(rows)) // len(rows)
    phase = log.phase_index[rows]
    starts = np.flatnonzero(np.diff(interval, prepend=-1) | np.diff(phase, prepend=phase[0]))
    count = np.diff(starts, append=len(rows))
    y = values[rows]
    result = {axis: _short(column[rows][starts + count - 1]) for axis, column in axes.items()}
    result["y"] = _short(np.add.reduceat(y, starts) / count)
    if len(starts) < len(rows):
        result["low"], result["high"] = _short(np.minimum.reduceat(y, starts)), _short(np.maximum.reduceat(y, starts))
    return result


def _short(values: Column) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
