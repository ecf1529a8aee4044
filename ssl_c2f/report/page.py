"""The whole page: the data of the figures as JSON, everything else as HTML, style and script inline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl_c2f.core.files import write_text
from ssl_c2f.report import sections as s
from ssl_c2f.report.read import Json, RunData, read_runs
from ssl_c2f.report.series import AXES, Column, curve, tokens_per_step

_MOST_CLASSES = 60  # more are neither readable on a small screen nor drawn fast
_ENDS = 20  # of many classes, the highest and the lowest that are shown

# Nothing may be fetched, whatever ends up in the page.
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


def _sections(runs: Sequence[RunData], drawn: Mapping[str, Any]) -> list[str]:
    """In reading order: what came out, how it got there, what it was made with."""
    there = {name for run in drawn["runs"] for name in run["curves"]}
    curves = "".join(figure("curve", *place) for place in CURVES if place[0] in there)
    return [
        s.section("overview", "At a glance", s.overview(runs)),
        s.section("missing", "What is missing", s.missing_section(runs)),
        s.section("probes", "Frozen features", _each(runs, s.probe_tables)),
        s.section("curves", "Training", curves and f"{_switches(runs)}<div class=figures>{curves}</div>"),
        s.section("strip", "What the phases see", _each(runs, s.film_strip, fold=True),
                  "The same clips at the end of every phase: input, and where it is masked what was kept of it."),
        s.section("finetune", "Fine-tuning", s.finetune_table(runs) + _class_figures(drawn)),
        s.section("plan", "Plan against actual", _each(runs, s.plan_table)),
        s.section("transfer", "Weights carried over", _each(runs, s.transfers)),
        s.section("config", "Options", s.config_section(runs)),
        s.section("provenance", "Provenance", _each(runs, s.provenance)),
    ]


def _each(runs: Sequence[RunData], part: Callable[[RunData], str], fold: bool = False) -> str:
    """The part for every run that has it, under the run's name where there are several."""
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
    ("loss", "Training loss", "Each phase at its own resolution, so a step at a boundary is no setback."),
    ("lr", "Learning rate", ""),
    ("spread", "Spread of features", "std_of_l2_normalized of a teacher's clip features: towards 0 they collapse."),
    ("tokens", "Tokens per step", "What the encoder learns from: tokens of all views times clips."),
    ("mask", "Mask ratio", ""),
)
SHARES = ("probe", "classifier")
STEPPED = ("tokens", "mask")  # constant between two records


def _columns(run: RunData) -> dict[str, Column]:
    log = run.log
    named = {"validation": run.validation_loss, "probe": run.probe, "classifier": run.classifier, "loss": "loss",
             "lr": "lr", "mask": "mask_ratio", "spread": "std_of_l2_normalized"}
    columns = {figure: log.column(name) for figure, name in named.items() if name}
    return columns | {"tokens": tokens_per_step(log)} if log.records else {}


def figures(runs: Sequence[RunData]) -> dict[str, Any]:
    """The data of all figures."""
    curves = []
    for run in runs:
        found = {name: c for name, column in _columns(run).items() if (c := curve(run.log, column))}
        bands = [{"name": p.name} | {axis: run.end(p.name, axis) for axis in AXES} for p in run.phases]
        bands = [band for band in bands if all(band[axis] is not None for axis in AXES)]
        curves.append({"name": run.name, "curves": found, "bands": bands})
    kinds = {name: {"percent": name in SHARES, "stepped": name in STEPPED} for name, _, _ in CURVES}
    return {"runs": curves, "figures": kinds, "matrices": _matrices(runs), "bars": _bars(runs)}


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
    labels = {"flops": "compute", "samples": "clips seen", "train_seconds": "training time"}
    axes = "".join(
        f'<label><input type=radio name=axis value="{axis}"{" checked" if i == 0 else ""}>{labels[axis]}</label>'
        for i, axis in enumerate(AXES)
    )
    names = "".join(
        f'<label class="c{i % 6}"><input type=checkbox name=run value="{i}" checked><i></i>{escape(run.name)}</label>'
        for i, run in enumerate(runs)
    )
    shown = f"<fieldset><legend>Runs</legend>{names}</fieldset>" if len(runs) > 1 else ""
    return f"<form class=switches><fieldset><legend>Against</legend>{axes}</fieldset>{shown}</form>"


def _matrices(runs: Sequence[RunData]) -> dict[str, Any]:
    found = {}
    for name, scores in _all_scores(runs).items():
        counts, classes = scores.get("confusion"), scores.get("classes", [])
        if isinstance(counts, list) and len(counts) == len(classes) and len(classes) > 1:
            found[name] = {"classes": classes, "counts": counts}
    return found


def _bars(runs: Sequence[RunData]) -> dict[str, Any]:
    """The score of each class; `ends`: how many of the highest and lowest are drawn, 0 where all are."""
    found = {}
    for name, scores in _all_scores(runs).items():
        for key in ("recall", "average_precision"):
            if isinstance(each := scores.get(key), dict) and each:
                ends = _ENDS if len(each) > _MOST_CLASSES else 0
                found[name] = {"measure": key.replace("_", " "), "rows": list(each.items()), "ends": ends}
    return found


def _all_scores(runs: Sequence[RunData]) -> dict[str, Json]:
    return {
        f"{run.name}/{name}" if len(runs) > 1 else name: scores for run in runs for name, scores in run.scores.items()
    }


def _class_figures(drawn: Mapping[str, Any]) -> str:
    places = "".join(
        (_matrix_place(name, drawn["matrices"][name]) if name in drawn["matrices"] else "")
        + (_bars_place(name, drawn["bars"][name]) if name in drawn["bars"] else "")
        for name in dict.fromkeys([*drawn["matrices"], *drawn["bars"]])
    )
    return places and f"<div class=figures>{places}</div>"


def _matrix_place(name: str, matrix: Json) -> str:
    count = len(matrix["classes"])
    if count <= _MOST_CLASSES:
        return figure("matrix", name, f"Confusion matrix, {name}", "Rows: what it is. Columns: what was predicted.")
    note = f"Of {count} classes those that were taken for one another most often; the CSV has the whole matrix."
    return figure("pairs", name, f"Confused most often, {name}", note)


def _bars_place(name: str, bars: Json) -> str:
    title, note = {
        "recall": ("Recall per class", "Share of each class that was recognised."),
        "average precision": ("Average precision per class", "How far a class's clips rank above all others."),
    }[bars["measure"]]
    if bars["ends"]:
        note += f" The {_ENDS} highest and the {_ENDS} lowest of {len(bars['rows'])}; the CSV has all."
    return figure("bars", name, f"{title}, {name}", note)
