"""The page: one HTML file with the figures' data as JSON, everything else as HTML, style and script inline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl_c2f.core.files import one_line, write_text
from ssl_c2f.report import sections as s
from ssl_c2f.report.read import Json, RunData, read_runs
from ssl_c2f.report.series import AXES, Column, curve, tokens_per_step

_MOST_CLASSES = 60  # more are neither readable on a small screen nor drawn fast
_ENDS = 20  # of many classes, the highest and the lowest that are shown

# The page loads nothing from outside, whatever a run's files put into it.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(runs: Sequence[Path], out: Path) -> Path:
    """Write the page about one or several run folders, in whatever state they are, to `out`.

    Raises:
        UserError: a run is no folder, or `out` cannot be written.
    """
    write_text(out, render(read_runs(runs)))
    return out


def render(runs: Sequence[RunData]) -> str:
    here = Path(__file__).parent
    title = " · ".join(run.name for run in runs)
    drawn = figures(runs)
    data = json.dumps(drawn, allow_nan=False).replace("<", "\\u003c")
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f'<link rel=icon href="data:,"><title>{escape(title)}</title>'
        f"<style>{(here / 'page.css').read_text(encoding='utf-8')}</style></head>\n<body>"
        f"<main><header class=top><p>ssl_c2f</p><h1>{escape(title)}</h1></header>\n"
        + "\n".join(part for part in _sections(runs, drawn) if part)
        + f'</main>\n<script type="application/json" id=data>{data}</script>\n'
        f"<script>{(here / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


_OF_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def _sections(runs: Sequence[RunData], drawn: Mapping[str, Any]) -> list[str]:
    """In reading order: results, training, and the options and machine behind them.

    What a section reads may be JSON of any shape, if a disk or a person changed a file: then it says so.
    """
    there = {name for run in drawn["runs"] for name in run["curves"]}
    curves = "".join(figure("curve", *place) for place in CURVES if place[0] in there)

    def section(name: str, title: str, body: Callable[[], str], lead: str = "") -> str:
        try:
            return s.section(name, title, body(), lead)
        except _OF_DAMAGE as error:
            reason = escape(f"{type(error).__name__}: {one_line(error)}"[:200])
            return s.section(name, title, f"<p>A file of the run that this is made of is damaged ({reason}).</p>")

    return [
        section("overview", "At a glance", lambda: s.overview(runs)),
        section("missing", "What is missing", lambda: _each(runs, s.missing)),
        section("probes", "Frozen features", lambda: _each(runs, s.probe_tables)),
        section("curves", "Training", lambda: curves and f"{_switches(runs)}<div class=figures>{curves}</div>"),
        section("strip", "What the phases see", lambda: _each(runs, s.pictures, fold=True),
                "The same clips at the end of every phase: the input, and the patches that masking kept of it."),
        section("finetune", "Fine-tuning", lambda: s.finetune_table(runs) + _class_figures(drawn)),
        section("plan", "Plan against actual", lambda: _each(runs, s.plan_table)),
        section("transfer", "Weights carried over", lambda: _each(runs, s.transfers)),
        section("config", "Options", lambda: s.config_section(runs)),
        section("provenance", "Provenance", lambda: _each(runs, s.provenance)),
    ]


def _each(runs: Sequence[RunData], part: Callable[[RunData], str], fold: bool = False) -> str:
    """The part for every run that has it, under the run's name where there are several (`fold`: to be folded away)."""
    found = [(run.name, html) for run in runs if (html := part(run))]
    if len(runs) == 1 or not found:
        return "".join(html for _, html in found)
    if fold:
        return "".join(
            f"<details{' open' if i == 0 else ''}><summary>{escape(name)}</summary>{html}</details>"
            for i, (name, html) in enumerate(found)
        )
    return "".join(f"<h3>{escape(name)}</h3>{html}" for name, html in found)


# id, title, note
CURVES = (
    ("validation", "Validation loss", "Held-out clips at full resolution in every phase: compare runs by this."),
    ("probe", "Probe score", "Nearest neighbours on frozen features of held-out clips, at full resolution."),
    ("classifier", "Validation score",
     "The classifier on held-out clips at full resolution: accuracy, or mAP where clips may have several labels."),
    ("loss", "Training loss", "Each phase at its own resolution, so jumps at boundaries are expected."),
    ("lr", "Learning rate", ""),
    ("spread", "Spread of features", "std_of_l2_normalized of the teacher's clip features: 0 means collapse."),
    ("tokens", "Tokens per step", "Tokens that the encoder processes in a step: those of all views of all clips."),
    ("mask", "Mask ratio", ""),
)
FRACTIONS = ("probe", "classifier")  # drawn in percent
STEPPED = ("tokens", "mask")  # constant between two records


def _columns(run: RunData) -> dict[str, Column]:
    named = {"validation": run.validation_loss, "probe": run.probe, "classifier": run.classifier, "loss": "loss",
             "lr": "lr", "mask": "mask_ratio", "spread": "std_of_l2_normalized"}
    columns = {figure: run.log.column(name) for figure, name in named.items() if name}
    return columns | {"tokens": tokens_per_step(run.log)} if run.log.records else {}


def figures(runs: Sequence[RunData]) -> dict[str, Any]:
    """The data of all figures, as the page's script takes them."""
    curves = []
    for run in runs:
        drawn = {name: c for name, column in _columns(run).items() if (c := curve(run.log, column))}
        ended = [phase for phase in run.phases if phase.end.keys() >= AXES.keys()]
        bands = [{"name": phase.name} | {axis: phase.end[axis] for axis in AXES} for phase in ended]
        curves.append({"name": run.name, "curves": drawn, "bands": bands})
    kinds = {name: {"percent": name in FRACTIONS, "stepped": name in STEPPED} for name, _, _ in CURVES}
    scores = {f"{r.name}/{name}" if len(runs) > 1 else name: scores for r in runs for name, scores in r.scores.items()}
    return {
        "runs": curves, "figures": kinds,
        "matrices": {name: found for name, each in scores.items() if (found := _drawn(_matrix, each))},
        "bars": {name: found for name, each in scores.items() if (found := _drawn(_bars, each))},
    }


def _drawn(make: Callable[[Json], Json | None], scores: Json) -> Json | None:
    """A figure's data; none, if the scores are damaged."""
    try:
        json.dumps(made := make(scores), allow_nan=False)
        return made
    except _OF_DAMAGE:
        return None


def _matrix(scores: Json) -> Json | None:
    """A confusion matrix and its classes."""
    counts, classes = scores.get("confusion"), scores.get("classes", [])
    fits = isinstance(counts, list) and len(counts) == len(classes) and len(classes) > 1
    return {"classes": classes, "counts": counts} if fits else None


def _bars(scores: Json) -> Json | None:
    """The score of each class; `ends`: how many of the highest and lowest are drawn, 0 where all are."""
    for key in ("average_precision", "recall"):
        if isinstance(each := scores.get(key), dict) and each:
            ends = _ENDS if len(each) > _MOST_CLASSES else 0
            return {"measure": key.replace("_", " "), "rows": list(each.items()), "ends": ends}
    return None


def figure(kind: str, name: str, title: str, note: str) -> str:
    """An empty figure that the script draws into."""
    return (
        f'<figure class=chart data-kind="{kind}" data-name="{escape(name)}"><h3>{escape(title)}</h3>'
        f'<div class=plot tabindex=0 role=img aria-label="{escape(title)}"></div>'
        f"<figcaption><output></output><span class=note>{escape(note)}</span></figcaption>"
        "<div class=save><button type=button data-save=svg>SVG</button> "
        "<button type=button data-save=csv>CSV</button></div></figure>"
    )


def _switches(runs: Sequence[RunData]) -> str:
    axes = "".join(
        f'<label><input type=radio name=axis value="{axis}"{" checked" if i == 0 else ""}>{label}</label>'
        for i, (axis, label) in enumerate(AXES.items())
    )
    names = "".join(
        f'<label class="c{i % 6}"><input type=checkbox name=run value="{i}" checked><i></i>{escape(run.name)}</label>'
        for i, run in enumerate(runs)
    )
    shown = f"<fieldset><legend>Runs</legend>{names}</fieldset>" if len(runs) > 1 else ""
    return f"<form class=switches><fieldset><legend>Against</legend>{axes}</fieldset>{shown}</form>"


def _class_figures(drawn: Mapping[str, Any]) -> str:
    matrices, bars = drawn["matrices"], drawn["bars"]
    found = [
        draw(name, data[name]) for name in dict.fromkeys([*matrices, *bars])
        for draw, data in ((_matrix_figure, matrices), (_bars_figure, bars)) if name in data
    ]
    return f"<div class=figures>{''.join(found)}</div>" if found else ""


def _matrix_figure(name: str, matrix: Json) -> str:
    count = len(matrix["classes"])
    if count <= _MOST_CLASSES:
        return figure("matrix", name, f"Confusion matrix, {name}", "Rows: the label. Columns: the prediction.")
    note = f"The pairs of the {count} classes that were confused most often; the CSV has the whole matrix."
    return figure("pairs", name, f"Confused most often, {name}", note)


def _bars_figure(name: str, bars: Json) -> str:
    title, note = {
        "recall": ("Recall per class", "The fraction of each class's clips that were predicted correctly."),
        "average precision": ("Average precision per class", "1 where all clips of a class rank above all others."),
    }[bars["measure"]]
    if bars["ends"]:
        note += f" The {_ENDS} highest and the {_ENDS} lowest of {len(bars['rows'])}; the CSV has all."
    return figure("bars", name, f"{title}, {name}", note)
