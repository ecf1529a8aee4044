"""Pieces of the page. Whatever comes from outside is escaped here, and nowhere else put into HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import yaml

from ssl_c2f.core.options import flatten
from ssl_c2f.core.provenance import command_line
from ssl_c2f.report.read import Clip, Json, PhaseData, RunData

Cell = object  # text, or (text to show, number to sort by)
_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def section(name: str, title: str, body: str, lead: str = "") -> str:
    """A section with its heading; nothing where there is no body."""
    lead = f"<p class=lead>{escape(lead)}</p>" if lead else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{lead}{body}</section>' if body else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], name: str, sort: bool = False) -> str:
    """A table that scrolls sideways where it is too wide, with a button for its CSV; `sort` makes its heads buttons."""
    head = "".join(
        f"<th scope=col aria-sort=none><button type=button>{escape(c)}</button></th>"
        if sort else f"<th scope=col>{escape(c)}</th>"
        for c in columns
    )
    body = "".join(f"<tr>{''.join(_cell(cell, i == 0) for i, cell in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class=table><div class=scroll tabindex=0 role=region aria-label="{escape(name)}">'
        f'<table data-name="{escape(name)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<div class=save><button type=button data-save=table>CSV</button></div></div>"
    )


def _cell(cell: Cell, first: bool) -> str:
    text, value = cell if isinstance(cell, tuple) else (cell, cell)
    attribute = f' data-value="{value}"' if isinstance(value, int | float) else ""
    kind = " class=number" if attribute else ""
    tag = "th scope=row" if first else "td"
    return f"<{tag}{attribute}{kind}>{escape(_text(text))}</{tag.split()[0]}>"


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def flops(value: float | None) -> Cell:
    if value is None:
        return None
    factor, letter = next((pair for pair in _SI if value >= pair[0]), (1.0, ""))
    return f"{value / factor:.3g} {letter}FLOPs", value


def seconds(value: float | None) -> Cell:
    if value is None:
        return None
    whole = round(value)
    text = f"{value:.1f} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{value / 3600:.1f} h"
    return text, value


def percent(value: float | None) -> Cell:
    return None if value is None else (f"{100 * value:.1f} %", value)


def overview(runs: Sequence[RunData]) -> str:
    """A line for each run."""
    columns = ("run", "status", "phases", "compute", "of a single phase", "training time", "validation loss",
               "validation score", "fine-tuned")
    rows = []
    for run in runs:
        last = run.phases[-1].name if run.phases else ""
        loss = run.log.last(last, run.validation_loss) if run.validation_loss else None
        rows.append((
            run.name, run.status, f"{sum(bool(p.done) for p in run.phases)} of {len(run.phases)}",
            flops(run.total("flops")),
            percent(run.plan.get("share_of_single_phase")), seconds(run.total("train_seconds")), loss,
            percent(run.last_score), _best(run),
        ))
    return table(columns, rows, "Runs", sort=len(runs) > 1)


def _best(run: RunData) -> Cell:
    """The best fine-tuning of the run's own weights, by the first one's metric: no other can be compared with it."""
    found = [(name, float(scores[name])) for scores in run.tuned.values()
             if not scores.get("from_scratch") and (name := metric(scores))]
    if not found:
        return None
    value = max(value for name, value in found if name == found[0][0])
    return f"{100 * value:.1f} %{' mAP' if found[0][0] == 'map' else ''}", value


def missing(run: RunData) -> list[str]:
    """What a reader may look for in vain, and why."""
    notes = []
    if not (run.config or run.log.records or run.phases):
        return ["The folder is empty: no run was started here."]
    if not run.log.records:
        notes.append("No curves: metrics.jsonl has no record yet.")
    if run.log.broken:
        notes.append(f"{run.log.broken} lines of metrics.jsonl are broken and left out (the last one, after a crash).")
    if run.status == "crashed":
        notes.append("The process that wrote this run died. The same command goes on from its last checkpoint.")
    if run.status == "stopped early":
        notes.append("The run has not reached its end. The same command goes on.")
    waiting = [p.name for p in run.phases if not p.done and p.name not in run.log.phases]
    notes += [f"Not started: {', '.join(waiting)}."] if waiting else []
    if run.log.records and not (run.validation_loss or run.classifier):  # a classifier has scores instead
        notes.append("No validation loss: no clips were held out (data.val_folds), evaluation.every is 0, or the "
                     "objective has none that could be compared (latent: its teacher moves).")
    if run.log.records and not (run.probe or run.classifier):
        notes.append("No validation score: it needs labels and evaluation.every above 0.")
    if not any(p.clips for p in run.phases):
        notes.append("No film strip: pictures are made at the end of a phase.")
    if not run.scores:
        notes.append("No fine-tuning yet: ssl_c2f finetune --ckpt RUN.")
    for name, part in (("plan.json", run.plan), ("provenance.json", run.provenance), ("config.yaml", run.config)):
        notes += [] if part else [f"No {name}."]
    if run.bad_files:
        notes.append(f"{run.bad_files} recordings could not be read and were left out (bad_files.jsonl).")
    return notes


def missing_section(runs: Sequence[RunData]) -> str:
    parts = []
    for run in runs:
        if notes := missing(run):
            items = "".join(f"<li>{escape(note)}</li>" for note in notes)
            parts.append((f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "") + f"<ul>{items}</ul>")
    return "".join(parts)


def plan_table(run: RunData) -> str:
    """Plan against actual, phase by phase."""
    columns = ("phase", "state", "frame", "grid", "tokens", "kept", "batch", "steps planned", "steps done",
               "compute planned", "compute done", "time", "clips/s")
    rows, before = [], {"step": 0.0, "flops": 0.0, "train_seconds": 0.0, "samples": 0.0}
    for phase in run.phases:
        end = {axis: run.end(phase.name, axis) for axis in before}
        done = {axis: None if value is None else value - before[axis] for axis, value in end.items()}
        plan, time, clips = phase.plan, done["train_seconds"], done["samples"]
        state = "done" if phase.done else "not started" if end["step"] is None else "unfinished"
        rows.append((
            phase.name, state, f"{plan['hop_ms']:g} ms" if "hop_ms" in plan else None,
            " x ".join(map(str, plan.get("grid", []))) or None, plan.get("tokens"), plan.get("kept"),
            plan.get("batch_size"), plan.get("steps"), None if done["step"] is None else round(done["step"]),
            flops(plan["pflops"] * 1e15 if "pflops" in plan else None), flops(done["flops"]), seconds(time),
            (f"{clips / time:.0f}", clips / time) if time and clips else None,
        ))
        before = {axis: value if value is not None else before[axis] for axis, value in end.items()}
    return table(columns, rows, f"Plan against actual, {run.name}") if rows else ""


def transfers(run: RunData) -> str:
    """What became of the weights at each boundary."""
    return "".join(map(_transfer, run.phases))


def _transfer(phase: PhaseData) -> str:
    if not phase.transfer:
        return ""
    count = phase.transfer.get("count", {})
    summary = ", ".join(f"{n} {action}" for action, n in count.items()) or "no tensors"
    changed = [t for t in phase.transfer.get("tensors", []) if t.get("action") != "copied"]
    rows = [(t.get("name"), t.get("action"), t.get("detail")) for t in changed]
    inner = "<p>Everything was copied as it was.</p>"
    if rows:
        inner = table(("tensor", "what", "how"), rows, f"Transfer to {phase.name}")
    origin = f"<p>from <code>{escape(str(phase.transfer.get('from', '')))}</code></p>"
    return f"<details><summary>to {escape(phase.name)}: {escape(summary)}</summary>{origin}{inner}</details>"


def film_strip(run: RunData) -> str:
    """The same clips in every phase."""
    names = list(dict.fromkeys(clip.name for phase in run.phases for clip in phase.clips))
    parts = []
    for name in names:
        shown = [(phase, clip) for phase in run.phases for clip in phase.clips if clip.name == name]
        sound = next((clip.sound for _, clip in shown if clip.sound), None)
        audio = f'<audio controls preload=metadata src="{sound}" aria-label="{escape(name)}"></audio>' if sound else ""
        rows = "".join(_strip_row(phase, clip) for phase, clip in shown)
        parts.append(f"<article class=clip><header><h3>{escape(name)}</h3>{audio}</header>{rows}</article>")
    return "".join(parts)


def _strip_row(phase: PhaseData, clip: Clip) -> str:
    facts = phase.pictures
    grid = " x ".join(map(str, facts.get("grid", [])))
    hidden = f", {facts['mask_ratio']:.0%} hidden ({facts['mask_shape']})" if facts.get("mask_ratio") else ""
    label = f"{phase.name}: frames of {facts.get('frame_ms', 0):g} ms, {grid} tokens{hidden}"
    images = "".join(
        f'<figure><img src="{image}" alt="{escape(f"{view} of {clip.name} in phase {phase.name}")}">'
        f"<figcaption>{escape(view)}</figcaption></figure>"
        for view, image in clip.pictures.items()
    )
    return f"<div class=strip><p>{escape(label)}</p><div class=images>{images}</div></div>"


def metric(scores: Json) -> str | None:
    """What the headline of a scores.json is: accuracy or map."""
    return next((name for name in ("accuracy", "map") if isinstance(scores.get(name), int | float)), None)


def score(scores: Json) -> float | None:
    """The headline of a scores.json."""
    return float(scores[name]) if (name := metric(scores)) else None


def interval(scores: Json) -> str | None:
    """Its confidence interval, where there is one."""
    found = scores.get("interval")
    return f"{100 * found[0]:.1f} to {100 * found[1]:.1f} %" if isinstance(found, list) and len(found) == 2 else None


def finetune_table(runs: Sequence[RunData]) -> str:
    rows: list[Sequence[Cell]] = []
    for run in runs:
        for name, scores in run.scores.items():
            main, each = metric(scores), [_dict(fold) for fold in _dict(scores.get("folds")).values()]
            folds = [fold[main] for fold in each if main and metric(fold) == main]
            start = "random weights" if scores.get("from_scratch") else "pretrained"
            kind = "accuracy" if "accuracy" in scores else "mAP"
            rows.append((
                f"{run.name}/{name}" if len(runs) > 1 else name, start, kind, percent(score(scores)), interval(scores),
                ", ".join(f"{100 * fold:.1f}" for fold in folds) or None,
            ))
    columns = ("name", "start", "score", "value", "95 % interval", "folds, %")
    return table(columns, rows, "Fine-tuning", sort=True) if rows else ""


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def probe_tables(run: RunData) -> str:
    """What linear classifiers and nearest neighbours make of frozen features, beside yardsticks."""
    parts = []
    for name, found in run.probes.items():
        rows = [
            (r.get("features"), r.get("readout"), *_spread(r.get("linear")), *_spread(r.get("knn")))
            for r in found.get("rows", [])
        ]
        title = f"Frozen features, probed on {name}"
        columns = ("features", "readout", "linear", "± folds", "kNN", "± folds")
        note = f"{found.get('clips')} recordings, {found.get('split')}"
        drawn = table(columns, rows, title, sort=True)
        parts.append(f"<h3>{escape(title)}</h3>{drawn}<p class=note>{escape(note)}</p>")
    return "".join(parts)


def _spread(scores: Any) -> tuple[Cell, Cell]:
    return percent(_dict(scores).get("mean")), percent(_dict(scores).get("std"))


def provenance(run: RunData) -> str:
    p = run.provenance
    if not p:
        return ""
    command = command_line([str(word) for word in p.get("command", [])])
    versions = ", ".join(f"{k} {v}" for k, v in _dict(p.get("versions")).items())
    hardware = ", ".join(
        f"{k.replace('_', ' ')}: {', '.join(map(str, v)) or 'none' if isinstance(v, list) else v}"
        for k, v in _dict(p.get("hardware")).items()
    )
    rows = (("folder", str(run.path)), ("command", command), ("started", p.get("started")),
            ("commit", p.get("commit") or "not a checkout"), ("versions", versions), ("hardware", hardware))
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(_text(v))}</dd>" for k, v in rows)
    return f"<dl>{items}</dl>"


def config_section(runs: Sequence[RunData]) -> str:
    """What differs between the runs, and each config."""
    runs = [run for run in runs if run.config]
    parts = [_differences(runs)] if len(runs) > 1 else []
    for run in runs:
        text = f"<pre tabindex=0>{escape(run.config)}</pre>"
        parts.append(f"<details><summary>{escape(run.name)}</summary>{text}</details>")
    return "".join(parts)


def _differences(runs: Sequence[RunData]) -> str:
    flat = [_leaves(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if len({f.get(key, "-") for f in flat}) > 1]
    if not keys:
        return "<p>The runs have the same options.</p>"
    rows = [(key, *(f.get(key, "-") for f in flat)) for key in keys]
    return table(("option", *(r.name for r in runs)), rows, "Options that differ")


def _leaves(text: str) -> dict[str, str]:
    """The dotted keys and values of a config."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return {
        key: "none" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)
        for key, value in flatten(tree)
    }
