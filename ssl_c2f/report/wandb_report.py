"""A W&B report about runs: what was run, curves of each phase, costs, pictures, fine-tuning, and the commands.

It shows W&B runs of its server; tables come from the run folders. The report's address is kept in the first run's
folder (wandb_report.json, by the set of runs that it is about), so that the same command updates the same report.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_c2f.core.files import one_line, read_json, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.provenance import command_line
from ssl_c2f.report import tables
from ssl_c2f.report.read import Json, RunData, read_runs
from ssl_c2f.report.series import AXES
from ssl_c2f.report.tables import Cell
from ssl_c2f.track.wandb_run import read_facts

KEPT = "wandb_report.json"
_TITLE = 120  # characters; W&B takes 128
_VIEWS = ("input", "kept", "reconstruction")


@dataclass(frozen=True)
class Tracked:
    """A run and what is known of its W&B runs (`wandb_run.read_facts`)."""

    data: RunData
    phases: dict[str, Json]  # by phase
    results: dict[str, Json]  # by path within the run: finetune/default/fold-1/phases/0-tune


def write_report(paths: Sequence[Path]) -> str:
    """Make the W&B report about run folders, or update it; returns its address.

    Raises:
        UserError: a run was not tracked, is not uploaded yet, nobody is logged in, or the server does not answer.
    """
    runs = [_tracked(run) for run in read_runs(paths)]
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from wandb_workspaces.reports import v2 as wr

    if not wandb.login(prompt=False, verify=False):
        raise UserError("nobody is logged in to W&B: run wandb login")
    first = next(iter(runs[0].phases.values()))
    try:
        entity = str(first["entity"] or wandb.Api().default_entity)
        report = _open(wr, paths, entity, first["project"])
        report.title = f"ssl_c2f: {', '.join(run.data.name for run in runs)}"[:_TITLE]
        report.width, report.blocks = "fixed", _blocks(wr, runs, entity)
        report.save()
    except Exception as error:  # wandb's errors have no common base that says which are the server's
        raise UserError(f"W&B's server did not take the report: {one_line(error)}") from None
    _keep(paths, report)
    return str(report.url)


def _tracked(run: RunData) -> Tracked:
    phases = {phase.name: facts for phase in run.phases if (facts := read_facts(phase.folder.path))}
    files = [file for top in ("finetune", "probe", "evaluation") for file in run.path.glob(f"{top}/**/wandb.json")]
    found = {file.parent.relative_to(run.path).as_posix(): read_facts(file.parent) for file in sorted(files)}
    results = {name: facts for name, facts in found.items() if facts}
    if not phases:
        raise UserError(
            f"{run.path}: no phase of it was tracked by W&B; track runs with tracking.wandb=online, or leave out "
            "--wandb for the page"
        )
    # W&B keeps a phase's files in the folder of its run, and marks those that `wandb sync` has uploaded
    folders = [(run.path, facts) for facts in phases.values()]
    folders += [(run.path / name.partition("/phases/")[0], facts) for name, facts in results.items()]
    waiting = [
        folder for folder, facts in folders
        if facts["offline"] and not list(folder.glob(f"wandb/offline-run-*-{facts['id']}/*.wandb.synced"))
    ]
    if waiting:
        copies = " ".join(f"{shlex.quote(str(folder))}/wandb/offline-run-*" for folder in dict.fromkeys(waiting))
        raise UserError(f"{run.path} was tracked offline; upload it first: wandb sync {copies}")
    return Tracked(run, phases, results)


def _open(wr: Any, paths: Sequence[Path], entity: str, project: str) -> Any:
    """The report that was made earlier about the same runs, if the server still has it; else a new one."""
    kept = read_json(paths[0] / KEPT).get(_about(paths))
    if isinstance(kept, dict) and kept.get("url"):
        try:
            return wr.Report.from_url(kept["url"])
        except (TypeError, ValueError):  # deleted: the server answers with nothing
            pass
    return wr.Report(project=project, entity=entity)


def _keep(paths: Sequence[Path], report: Any) -> None:
    """Keep the report's address, beside those of other sets of runs that begin with the same one."""
    kept = read_json(paths[0] / KEPT) | {_about(paths): {"id": report.id, "url": report.url}}
    write_json(paths[0] / KEPT, kept)


def _about(paths: Sequence[Path]) -> str:
    """The key of a set of runs: their paths relative to the first, so that all of them may be moved together."""
    first = paths[0].resolve()
    return " ".join(sorted({os.path.relpath(path.resolve(), first) for path in paths}))


def _blocks(wr: Any, runs: Sequence[Tracked], entity: str) -> list[Any]:
    """The report in reading order."""
    phases = [_runset(wr, run, run.phases.values(), entity) for run in runs]
    blocks = [
        wr.H2("What was run"), wr.MarkdownBlock(_overview(runs)),
        wr.H2("Training"),
        wr.MarkdownBlock(
            "Each phase is a line of its own. Validation is on held-out clips at full resolution in every phase, so "
            "compare by it; the training loss is at each phase's own resolution."
        ),
        wr.PanelGrid(runsets=phases, panels=_curves(wr, runs)),
        wr.H2("Cost"), wr.MarkdownBlock("\n\n".join(map(_costs, runs))),
    ]
    if any(phase.clips for run in runs for phase in run.data.phases):
        views = [v for v in _VIEWS if any(v in c.images for r in runs for p in r.data.phases for c in p.clips)]
        keys = [f"pictures/{view}" for view in views]
        panel = wr.MediaBrowser(media_keys=keys, num_columns=3, layout=_wide(wr, 16))
        title = "Input, mask and reconstruction" if len(views) > 1 else "Input"
        blocks += [wr.H2(title), wr.PanelGrid(runsets=phases, panels=[panel])]
    if any(run.data.scores or run.data.probes for run in runs):
        blocks += [wr.H2("Fine-tuning and probes"), wr.MarkdownBlock(_results(runs)), *_result_panels(wr, runs, entity)]
    commands = [command for run in runs for command in _commands(run.data)]
    return [*blocks, wr.H2("Commands"), wr.CodeBlock(code="\n".join(commands), language="python")]


def _runset(wr: Any, run: Tracked, facts: Iterable[Json], entity: str) -> Any:
    from wandb_workspaces import expr

    facts = list(facts)
    return wr.Runset(
        entity=facts[0]["entity"] or entity, project=facts[0]["project"], name=run.data.name,
        filters=[expr.Metric("ID").isin([f["id"] for f in facts])],
    )


def _curves(wr: Any, runs: Sequence[Tracked]) -> list[Any]:
    """Loss and scores against FLOPs, and what the schedule did; only what was logged."""
    logged = {name for run in runs for name in run.data.log.names}
    scores = sorted(name for name in logged if name.startswith("val/"))
    wanted = [*scores, "loss", "lr", "mask_ratio", "clips_per_second"]
    panels = []
    for i, name in enumerate(name for name in wanted if name in logged):
        titles = {
            f"{facts['id']}:{name}": f"{run.data.name} {phase}" if len(runs) > 1 else phase
            for run in runs for phase, facts in run.phases.items()
        }
        layout = wr.Layout(x=12 * (i % 2), y=8 * (i // 2), w=12, h=8)
        panels.append(wr.LinePlot(title=name, x="flops", y=[name], title_x="FLOPs", line_titles=titles, layout=layout))
    return panels


def _wide(wr: Any, height: int) -> Any:
    return wr.Layout(x=0, y=0, w=24, h=height)


def _result_panels(wr: Any, runs: Sequence[Tracked], entity: str) -> list[Any]:
    """The fine-tuning curves, and the confusion matrices as tables."""
    grids = []
    for run in runs:
        tuned = {name: facts for name, facts in run.results.items() if name.startswith("finetune/")}
        folds = [facts for name, facts in tuned.items() if "/phases/" in name]
        scores = [facts for name, facts in tuned.items() if "/phases/" not in name]
        if folds:
            panel = wr.LinePlot(title="loss", x="samples", y=["loss"], layout=_wide(wr, 8))
            grids.append(wr.PanelGrid(runsets=[_runset(wr, run, folds, entity)], panels=[panel]))
        if scores and any("confusion" in found for found in run.data.scores.values()):
            table = wr.WeavePanelSummaryTable(table_name="confusion", layout=_wide(wr, 10))
            grids.append(wr.PanelGrid(runsets=[_runset(wr, run, scores, entity)], panels=[table]))
    return grids


def _overview(runs: Sequence[Tracked]) -> str:
    rows = []
    for run in runs:
        links = ", ".join(f"[{name}]({facts['url']})" if facts["url"] else name for name, facts in run.phases.items())
        phases = " → ".join(phase.name for phase in run.data.phases)
        rows.append((run.data.name, run.data.status, phases, *tables.totals(run.data), links))
    return markdown(("run", "status", "phases", *tables.TOTALS, "W&B runs"), rows)


def _costs(run: Tracked) -> str:
    """What each phase cost, and what a single phase of as many clips at full resolution would cost."""
    def row(name: str, tokens: Cell, kept: Cell, counters: Json) -> tuple[Cell, ...]:
        return (name, tokens, kept, round(counters["samples"]), tables.flops(counters["flops"]),
                tables.seconds(counters["train_seconds"]))

    counted = [phase for phase in run.data.phases if AXES.keys() <= phase.own.keys()]
    total = {axis: run.data.total(axis) or 0.0 for axis in AXES}
    rows = [row(phase.name, phase.plan.get("tokens"), phase.plan.get("kept"), phase.own) for phase in counted]
    rows.append(row("**all phases**", None, None, total))
    if baseline := run.data.plan.get("single_phase_pflops"):
        clips = sum(phase.plan.get("clips", 0) for phase in run.data.phases)
        rows.append(("single phase (planned)", None, None, clips, tables.flops(baseline * 1e15), None))
    columns = ("phase", "tokens", "kept", "clips", "compute", "time")
    return f"**{_escape(run.data.name)}**\n\n{markdown(columns, rows)}"


def _results(runs: Sequence[Tracked]) -> str:
    tuned = [
        (run.data.name, name, *tables.scores_row(scores)) for run in runs for name, scores in run.data.scores.items()
    ]
    probed = [
        (run.data.name, name, *row)
        for run in runs for name, found in run.data.probes.items() for row in tables.probe_rows(found)
    ]
    parts = [markdown(("run", "name", *tables.SCORES), tuned)] if tuned else []
    parts += [markdown(("run", "recordings", *tables.PROBES), probed)] if probed else []
    return "\n\n".join(parts)


def _commands(run: RunData) -> list[str]:
    """The command that made the run, and those of its fine-tunings."""
    files = [run.path / "provenance.json", *sorted(run.path.glob("finetune/**/provenance.json"))]
    found = [words for f in files if (words := read_json(f).get("command"))]
    return list(dict.fromkeys(command_line([str(word) for word in words]) for words in found))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_escape(tables.text(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Names from outside end no cell of a table, and no HTML comes of them."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
