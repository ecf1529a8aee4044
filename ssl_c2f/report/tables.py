"""Tables as rows of cells, which the page renders as HTML and the W&B report as Markdown."""

from __future__ import annotations

from typing import Any

from ssl_c2f.report.read import Json, RunData

Cell = str | int | float | tuple[str, float] | None  # a tuple: the text to show, and the number to sort by
TOTALS = ("compute", "of a single phase", "training time", "validation loss", "validation score")
SCORES = ("start", "score", "value", "95 % interval")
PROBES = ("features", "pooling", "linear", "± folds", "kNN", "± folds")
_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def text(cell: Cell) -> str:
    """A cell as people read it."""
    if isinstance(cell, tuple):
        return cell[0]
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def flops(value: float | None) -> Cell:
    if value is None:
        return None
    factor, letter = next((pair for pair in _SI if value >= pair[0]), (1.0, ""))
    return f"{value / factor:.3g} {letter}FLOPs", value


def seconds(value: float | None) -> Cell:
    if value is None:
        return None
    whole = round(value)
    shown = f"{value:.1f} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{value / 3600:.1f} h"
    return shown, value


def percent(value: float | None) -> Cell:
    return None if value is None else (f"{100 * value:.1f} %", value)


def totals(run: RunData) -> tuple[Cell, ...]:
    """A run's TOTALS: what it cost, and its last validation."""
    loss = run.log.last(run.phases[-1].name, run.validation_loss) if run.phases and run.validation_loss else None
    return (
        flops(run.total("flops")), percent(run.plan.get("share_of_single_phase")), seconds(run.total("train_seconds")),
        loss, percent(run.last_score),
    )


def metric(scores: Json) -> str | None:
    """The main metric of a scores.json: accuracy or map."""
    return next((name for name in ("accuracy", "map") if isinstance(scores.get(name), int | float)), None)


def scores_row(scores: Json) -> tuple[Cell, ...]:
    """The SCORES of a scores.json."""
    main, interval = metric(scores), list(scores.get("interval") or [])
    return (
        "random weights" if scores.get("from_scratch") else "pretrained",
        "accuracy" if "accuracy" in scores else "mAP",
        percent(float(scores[main]) if main else None),
        f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %" if len(interval) == 2 else None,
    )


def probe_rows(found: Json) -> list[tuple[Cell, ...]]:
    """The PROBES of a probe.json: mean and std over the folds of a linear classifier and of kNN on frozen features."""
    return [
        (row.get("features"), row.get("readout"), *_mean_and_std(row.get("linear")), *_mean_and_std(row.get("knn")))
        for row in found.get("rows", [])
    ]


def _mean_and_std(scores: Any) -> tuple[Cell, Cell]:
    found = scores if isinstance(scores, dict) else {}
    return percent(found.get("mean")), percent(found.get("std"))
