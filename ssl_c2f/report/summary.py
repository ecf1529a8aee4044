"""What a run has to show, read from its folder: a short table at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_c2f.core.files import read_jsonl
from ssl_c2f.core.progress import table
from ssl_c2f.core.run_folder import RunFolder


def last_of_phases(records: list[dict[str, Any]]) -> Mapping[str, dict[str, Any]]:
    """Phase -> the last value of everything that was logged in it."""
    phases: dict[str, dict[str, Any]] = {}
    for record in records:
        phases.setdefault(record["phase"], {}).update(record)
    return phases


def print_summary(run: Path) -> None:
    """A line for each phase, and the paths of what was made."""
    phases = last_of_phases(read_jsonl(RunFolder(run).metrics))
    scores = sorted({key for values in phases.values() for key in values if key.startswith("val/")})
    columns = ("phase", "steps", "clips", "PFLOPs", "time", "loss", *scores)
    rows = [
        (name, v["step"], f"{v['samples']:,}", f"{v['flops'] / 1e15:.3g}", f"{v['train_seconds']:.0f} s",
         _number(v.get("loss")), *(_number(v.get(score)) for score in scores))
        for name, v in phases.items()
    ]
    table(f"{run} (totals from the start)", columns, rows)
    bad = RunFolder(run).bad_files
    if bad.exists():
        print(f"{len(read_jsonl(bad))} unreadable files were skipped: {bad}")
    newest = [found for phase in RunFolder(run).phases() if (found := phase.newest())]
    for made in [RunFolder(run).metrics, *newest]:
        print(made)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
