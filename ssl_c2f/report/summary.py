"""A run's results, read from its folder: the table that is printed at its end."""

from __future__ import annotations

from pathlib import Path

from ssl_c2f.core.files import read_jsonl
from ssl_c2f.core.progress import table
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.report.series import read_log


def print_summary(run: Path) -> None:
    """Print a line for each phase, and the paths of the metrics and of each phase's last checkpoint."""
    folder, log = RunFolder(run), read_log(RunFolder(run).metrics)
    scores = sorted(name for name in log.names if name.startswith("val/"))
    rows = []
    for phase in log.phases:
        step, clips, flops, seconds = (log.last(phase, n) or 0 for n in ("step", "samples", "flops", "train_seconds"))
        rows.append((phase, f"{step:.0f}", f"{clips:,.0f}", f"{flops / 1e15:.3g}", f"{seconds:.0f} s",
                     *(_number(log.last(phase, name)) for name in ("loss", *scores))))
    columns = ("phase", "steps", "clips", "PFLOPs", "time", "loss", *scores)
    table(f"{run} (totals from the start)", columns, rows)
    if bad := len(read_jsonl(folder.bad_files)):
        print(f"{bad} unreadable files were skipped: {folder.bad_files}")
    for made in (folder.metrics, *(newest for phase in folder.phases() if (newest := phase.newest()))):
        print(made)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
