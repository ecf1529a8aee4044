"""The sections of the page as HTML. Whatever comes from outside is escaped here, and nowhere else put into HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

import yaml

from ssl_c2f.core.files import as_dict
from ssl_c2f.core.options import flatten
from ssl_c2f.core.provenance import command_line
from ssl_c2f.report import tables
from ssl_c2f.report.read import ClipPictures, Json, PhaseData, RunData
from ssl_c2f.report.tables import Cell


def section(name: str, title: str, body: str, lead: str = "") -> str:
    """A section with its heading; nothing where there is no body."""
    lead = f"<p class=lead>{escape(lead)}</p>" if lead else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{lead}{body}</section>' if body else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], name: str, sort: bool = False) -> str:
    """A table that scrolls sideways where it is too wide, with a button that saves it as CSV; with `sort` a click on a
    column's heading sorts the rows."""
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
    value = cell[1] if isinstance(cell, tuple) else cell
    attribute = f' data-value="{value}" class=number' if isinstance(value, int | float) else ""
    tag, scope = ("th", " scope=row") if first else ("td", "")
    return f"<{tag}{scope}{attribute}>{escape(tables.text(cell))}</{tag}>"


def overview(runs: Sequence[RunData]) -> str:
    """A line for each run."""
    columns = ("run", "status", "phases", *tables.TOTALS, "fine-tuned")
    rows = [
        (run.name, run.status, f"{sum(phase.done for phase in run.phases)} of {len(run.phases)}", *tables.totals(run),
         _best(run))
        for run in runs
    ]
    return table(columns, rows, "Runs", sort=len(runs) > 1)


def _best(run: RunData) -> Cell:
    """The best fine-tuning of the run's own weights, by the first one's metric: no other can be compared with it."""
    found = [(name, float(scores[name])) for scores in run.tuned.values()
             if not scores.get("from_scratch") and (name := tables.metric(scores))]
    if not found:
        return None
    value = max(value for name, value in found if name == found[0][0])
    return f"{100 * value:.1f} %{' mAP' if found[0][0] == 'map' else ''}", value


def missing(run: RunData) -> str:
    """What is not on the page, and why."""
    started, log = bool(run.config or run.log.records or run.phases), run.log
    waiting = ", ".join(p.name for p in run.phases if not p.done and p.name not in log.phases)
    notes = {
        "No curves: metrics.jsonl has no record yet.": not log.records,
        f"{log.broken} lines of metrics.jsonl are broken and left out (the last one, after a crash).": log.broken,
        "The process that wrote this run died. The same command resumes from its last checkpoint.":
            run.status == "crashed",
        "The run has not reached its end. The same command resumes it.": run.status == "stopped early",
        f"Not started: {waiting}.": waiting,
        "No validation loss: no clips were held out (data.val_folds), evaluation.every is 0, or the objective's loss "
        "cannot be compared over time (latent: its teacher changes).":  # a classifier has scores instead
            log.records and not (run.validation_loss or run.classifier),
        "No validation score: it needs labels and evaluation.every above 0.":
            log.records and not (run.probe or run.classifier),
        "No pictures: they are made at the end of a phase.": not any(p.clips for p in run.phases),
        "No fine-tuning yet: ssl_c2f finetune --ckpt RUN.": not run.scores,
        "No plan.json.": not run.plan, "No provenance.json.": not run.provenance, "No config.yaml.": not run.config,
        f"{run.bad_files} recordings could not be read and were left out (bad_files.jsonl).": run.bad_files,
    } if started else {"The folder is empty: no run was started here.": True}
    items = "".join(f"<li>{escape(note)}</li>" for note, holds in notes.items() if holds)
    return f"<ul>{items}</ul>" if items else ""


def plan_table(run: RunData) -> str:
    """What was planned for each phase, and what it took."""
    columns = ("phase", "state", "frame", "grid", "tokens", "kept", "batch", "steps planned", "steps done",
               "compute planned", "compute done", "time", "clips/s")
    rows = [_plan_row(phase) for phase in run.phases]
    return table(columns, rows, f"Plan against actual, {run.name}") if rows else ""


def _plan_row(phase: PhaseData) -> tuple[Cell, ...]:
    plan, own = phase.plan, phase.own
    steps, time, clips = own.get("step"), own.get("train_seconds"), own.get("samples")
    return (
        phase.name, "done" if phase.done else "not started" if steps is None else "unfinished",
        f"{plan['hop_ms']:g} ms" if "hop_ms" in plan else None, " x ".join(map(str, plan.get("grid", []))) or None,
        plan.get("tokens"), plan.get("kept"), plan.get("batch_size"),
        plan.get("steps"), None if steps is None else round(steps),
        tables.flops(plan["pflops"] * 1e15 if "pflops" in plan else None), tables.flops(own.get("flops")),
        tables.seconds(time), (f"{clips / time:.0f}", clips / time) if time and clips else None,
    )


def transfers(run: RunData) -> str:
    """How many tensors each phase took over from the one before, and which ones were changed."""
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


def pictures(run: RunData) -> str:
    """The same clips as each phase saw them, one row per phase."""
    names = list(dict.fromkeys(clip.name for phase in run.phases for clip in phase.clips))
    parts = []
    for name in names:
        shown = [(phase, clip) for phase in run.phases for clip in phase.clips if clip.name == name]
        sound = next((clip.sound for _, clip in shown if clip.sound), None)
        audio = f'<audio controls preload=metadata src="{sound}" aria-label="{escape(name)}"></audio>' if sound else ""
        rows = "".join(_pictures_row(phase, clip) for phase, clip in shown)
        parts.append(f"<article class=clip><header><h3>{escape(name)}</h3>{audio}</header>{rows}</article>")
    return "".join(parts)


def _pictures_row(phase: PhaseData, clip: ClipPictures) -> str:
    facts = phase.pictures
    grid = " x ".join(map(str, facts.get("grid", [])))
    mask = f", {facts['mask_ratio']:.0%} masked ({facts['mask_shape']})" if facts.get("mask_ratio") else ""
    label = f"{phase.name}: frames of {facts.get('frame_ms', 0):g} ms, {grid} tokens{mask}"
    images = "".join(
        f'<figure><img src="{image}" alt="{escape(f"{view} of {clip.name} in phase {phase.name}")}">'
        f"<figcaption>{escape(view)}</figcaption></figure>"
        for view, image in clip.images.items()
    )
    return f"<div class=strip><p>{escape(label)}</p><div class=images>{images}</div></div>"


def finetune_table(runs: Sequence[RunData]) -> str:
    """The scores of fine-tuning and of evaluation, with those of each fold."""
    rows = [
        (f"{run.name}/{name}" if len(runs) > 1 else name, *tables.scores_row(scores), _folds(scores))
        for run in runs for name, scores in run.scores.items()
    ]
    return table(("name", *tables.SCORES, "folds, %"), rows, "Fine-tuning", sort=True) if rows else ""


def _folds(scores: Json) -> str | None:
    main, folds = tables.metric(scores), [as_dict(fold) for fold in as_dict(scores.get("folds")).values()]
    return ", ".join(f"{100 * fold[main]:.1f}" for fold in folds if main and tables.metric(fold) == main) or None


def probe_tables(run: RunData) -> str:
    """Scores of linear classifiers and of nearest neighbours on frozen features, beside those of the baselines."""
    parts = []
    for name, found in run.probes.items():
        title = f"Frozen features, probed on {name}"
        note = f"{found.get('clips')} recordings, {found.get('split')}"
        shown = table(tables.PROBES, tables.probe_rows(found), title, sort=True)
        parts.append(f"<h3>{escape(title)}</h3>{shown}<p class=note>{escape(note)}</p>")
    return "".join(parts)


def provenance(run: RunData) -> str:
    """The command, commit, versions and hardware of a run."""
    p = run.provenance
    if not p:
        return ""
    command = command_line([str(word) for word in p.get("command", [])])
    versions = ", ".join(f"{k} {v}" for k, v in as_dict(p.get("versions")).items())
    hardware = ", ".join(
        f"{k.replace('_', ' ')}: {', '.join(map(str, v)) or 'none' if isinstance(v, list) else v}"
        for k, v in as_dict(p.get("hardware")).items()
    )
    rows = (("folder", str(run.path)), ("command", command), ("started", p.get("started")),
            ("commit", p.get("commit") or "not a checkout"), ("versions", versions), ("hardware", hardware))
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(tables.text(v))}</dd>" for k, v in rows)
    return f"<dl>{items}</dl>"


def config_section(runs: Sequence[RunData]) -> str:
    """The options that differ between the runs, and each config whole."""
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
