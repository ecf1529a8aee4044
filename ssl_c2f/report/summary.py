"""What a run has to show, read from its folder: a short table at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_c2f.core.progress import table
from ssl_c2f.core.run_folder import RunFolder


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a half-written last line is left out."""
    file = RunFolder(run).metrics
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def last_of_phases(records: list[dict[str, Any]]) -> Mapping[str, dict[str, Any]]:
    """Phase -> the last value of everything that was logged in it."""
    phases: dict[str, dict[str, Any]] = {}
    for record in records:
        phases.setdefault(record["phase"], {}).update(record)
    return phases


def print_summary(run: Path) -> None:
    """A line for each phase, and the paths of what was made."""
    phases = last_of_phases(read_metrics(run))
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
        print(f"{len(bad.read_text().splitlines())} unreadable files were skipped: {bad}")
    newest = [sorted(folder.glob("checkpoints/step-*"))[-1:] for folder in sorted((run / "phases").glob("*-*"))]
    for made in [RunFolder(run).metrics, *(path for paths in newest for path in paths)]:
        print(made)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
