"""A W&B report about runs: what was run, curves with their phases, costs, pictures, fine-tuning, and the commands.

It shows W&B runs of its server; tables come from the run folders. Its address is kept in the first run's folder
(wandb_report.json, by the runs that it is about), so that another time the same report is brought up to date.
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
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.report import sections
from ssl_c2f.report.read import Json, RunData, read_runs
from ssl_c2f.track.wandb_run import read_facts

KEPT = "wandb_report.json"
_TITLE = 120  # characters; W&B takes 128
_VIEWS = ("input", "kept", "reconstruction")


@dataclass(frozen=True)
class Tracked:
    """A run, and its W&B runs by the folder that their facts lie in."""

    data: RunData
    phases: dict[str, Json]  # by phase
    results: dict[str, Json]  # by path within the run: finetune/default/fold-1/phases/0-tune

    def named(self, pattern: str) -> dict[str, Json]:
        return {name: facts for name, facts in self.results.items() if name.startswith(pattern)}


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
    phases = {
        phase.name: facts for i, phase in enumerate(run.phases)
        if (facts := read_facts(RunFolder(run.path).phase(i, phase.name).path))
    }
    tops = ("finetune", "probe", "evaluation")
    found = sorted(f.parent for top in tops for f in run.path.glob(f"{top}/**/wandb.json"))
    results = {name: facts for folder in found if (facts := read_facts(folder))
               for name in [folder.relative_to(run.path).as_posix()]}
    if not phases:
        raise UserError(
            f"{run.path}: no phase of it was tracked by W&B; track runs with tracking.wandb=online, or leave out "
            "--wandb for the page"
        )
    waiting = [
        folder for folder, facts in [*((run.path, f) for f in phases.values()),
                                     *((run.path / name.partition("/phases/")[0], f) for name, f in results.items())]
        if facts["offline"] and not list(folder.glob(f"wandb/offline-run-*-{facts['id']}/*.wandb.synced"))
    ]
    if waiting:
        folders = " ".join(f"{shlex.quote(str(folder))}/wandb/offline-run-*" for folder in dict.fromkeys(waiting))
        raise UserError(f"{run.path} was tracked offline; upload it first: wandb sync {folders}")
    return Tracked(run, phases, results)


def _open(wr: Any, paths: Sequence[Path], entity: str, project: str) -> Any:
    """The report that was made before about the same runs, if its server still has it; else a new one."""
    kept = read_json(paths[0] / KEPT).get(_about(paths))
    if isinstance(kept, dict) and kept.get("url"):
        try:
            return wr.Report.from_url(kept["url"])
        except (TypeError, ValueError):  # deleted: the server answers with nothing
            pass
    return wr.Report(project=project, entity=entity)


def _keep(paths: Sequence[Path], report: Any) -> None:
    """Beside those of other sets of runs that begin with the same one."""
    kept = read_json(paths[0] / KEPT) | {_about(paths): {"id": report.id, "url": report.url}}
    write_json(paths[0] / KEPT, kept)


def _about(paths: Sequence[Path]) -> str:
    """A set of runs by their places, seen from the first: they may be moved together."""
    first = paths[0].resolve()
    return " ".join(sorted({os.path.relpath(path.resolve(), first) for path in paths}))


def _blocks(wr: Any, runs: Sequence[Tracked], entity: str) -> list[Any]:
    """In reading order: what was run, how it went, what it cost, what it saw, what it is good for, how to repeat it."""
    blocks = [
        wr.H2("What was run"), wr.MarkdownBlock(_overview(runs)),
        wr.H2("Training"),
        wr.MarkdownBlock(
            "Each phase is a line of its own. Validation is on held-out clips at full resolution in every phase, so "
            "compare by it; the training loss is at each phase's own resolution."
        ),
        wr.PanelGrid(runsets=[_runset(wr, run, run.phases.values(), entity) for run in runs], panels=_curves(wr, runs)),
        wr.H2("Cost"), wr.MarkdownBlock("\n\n".join(map(_costs, runs))),
    ]
    if any(phase.clips for run in runs for phase in run.data.phases):
        views = [v for v in _VIEWS if any(v in c.pictures for r in runs for p in r.data.phases for c in p.clips)]
        keys = [f"pictures/{view}" for view in views]
        panel = wr.MediaBrowser(media_keys=keys, num_columns=3, layout=_wide(wr, 0, 16))
        title = "Input, mask and reconstruction" if len(views) > 1 else "Input"
        blocks += [wr.H2(title), wr.PanelGrid(
            runsets=[_runset(wr, run, run.phases.values(), entity) for run in runs], panels=[panel])]
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
    several = len(runs) > 1
    panels = []
    for i, name in enumerate(name for name in wanted if name in logged):
        titles = {
            f"{facts['id']}:{name}": f"{run.data.name} {phase}" if several else phase
            for run in runs for phase, facts in run.phases.items()
        }
        layout = wr.Layout(x=12 * (i % 2), y=8 * (i // 2), w=12, h=8)
        panels.append(wr.LinePlot(title=name, x="flops", y=[name], title_x="FLOPs", line_titles=titles, layout=layout))
    return panels


def _wide(wr: Any, y: int, height: int) -> Any:
    return wr.Layout(x=0, y=y, w=24, h=height)


def _result_panels(wr: Any, runs: Sequence[Tracked], entity: str) -> list[Any]:
    """The fine-tuning curves, and the confusion matrices as tables."""
    grids = []
    for run in runs:
        tunings = [facts for name, facts in run.named("finetune/").items() if "/phases/" in name]
        scores = [facts for name, facts in run.named("finetune/").items() if "/phases/" not in name]
        if tunings:
            panel = wr.LinePlot(title="loss", x="samples", y=["loss"], layout=_wide(wr, 0, 8))
            grids.append(wr.PanelGrid(runsets=[_runset(wr, run, tunings, entity)], panels=[panel]))
        if scores and any("confusion" in found for found in run.data.scores.values()):
            table = wr.WeavePanelSummaryTable(table_name="confusion", layout=_wide(wr, 0, 10))
            grids.append(wr.PanelGrid(runsets=[_runset(wr, run, scores, entity)], panels=[table]))
    return grids


def _overview(runs: Sequence[Tracked]) -> str:
    columns = ("run", "status", "phases", "compute", "of a single phase", "training time", "validation loss",
               "validation score", "W&B runs")
    rows = []
    for run in runs:
        data = run.data
        last = data.phases[-1].name
        loss = data.log.last(last, data.validation_loss) if data.validation_loss else None
        links = ", ".join(f"[{name}]({facts['url']})" if facts["url"] else name for name, facts in run.phases.items())
        rows.append((
            data.name, data.status, " → ".join(phase.name for phase in data.phases),
            sections.flops(data.total("flops")), sections.percent(data.plan.get("share_of_single_phase")),
            sections.seconds(data.total("train_seconds")), loss, sections.percent(data.last_score), links,
        ))
    return table(columns, rows)


def _costs(run: Tracked) -> str:
    """What each phase cost, and what a single phase of as many clips at full resolution would."""
    rows: list[Sequence[Any]] = []
    before = dict.fromkeys(("flops", "samples", "train_seconds"), 0.0)
    for phase in run.data.phases:
        end = {axis: run.data.end(phase.name, axis) for axis in before}
        if any(value is None for value in end.values()):
            continue
        done = {axis: (value or 0.0) - before[axis] for axis, value in end.items()}
        before = {axis: value or 0.0 for axis, value in end.items()}
        rows.append((phase.name, phase.plan.get("tokens"), phase.plan.get("kept"), round(done["samples"]),
                     sections.flops(done["flops"]), sections.seconds(done["train_seconds"])))
    rows.append(("**all phases**", None, None, round(before["samples"]), sections.flops(before["flops"]),
                 sections.seconds(before["train_seconds"])))
    if baseline := run.data.plan.get("single_phase_pflops"):
        clips = sum(phase.plan.get("clips", 0) for phase in run.data.phases)
        rows.append(("single phase (planned)", None, None, clips, sections.flops(baseline * 1e15), None))
    columns = ("phase", "tokens", "kept", "clips", "compute", "time")
    return f"**{_escape(run.data.name)}**\n\n{table(columns, rows)}"


def _results(runs: Sequence[Tracked]) -> str:
    tuned, probed = [], []
    for run in runs:
        for name, scores in run.data.scores.items():
            start = "random weights" if scores.get("from_scratch") else "pretrained"
            kind = "accuracy" if "accuracy" in scores else "mAP"
            tuned.append((run.data.name, name, start, kind, sections.percent(sections.score(scores)),
                          sections.interval(scores)))
        for name, found in run.data.probes.items():
            probed += [
                (run.data.name, name, row.get("features"), row.get("readout"),
                 *(sections.percent((row.get(kind) or {}).get("mean")) for kind in ("linear", "knn")))
                for row in found.get("rows", [])
            ]
    parts = [table(("run", "name", "start", "score", "value", "95 % interval"), tuned)] if tuned else []
    parts += [table(("run", "recordings", "features", "readout", "linear", "kNN"), probed)] if probed else []
    return "\n\n".join(parts)


def _commands(run: RunData) -> list[str]:
    """The command that made the run, and those of its fine-tunings."""
    files = [run.path / "provenance.json", *sorted(run.path.glob("finetune/**/provenance.json"))]
    found = [words for f in files if (words := read_json(f).get("command"))]
    return list(dict.fromkeys(command_line([str(word) for word in words]) for words in found))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; a cell may be (text, number), None is "-"."""
    lines = [columns, ["---"] * len(columns), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cell: Any) -> str:
    value = cell[0] if isinstance(cell, tuple) else cell
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else _escape(str(value))


def _escape(text: str) -> str:
    """A name cannot end a cell, and no HTML comes of it."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
