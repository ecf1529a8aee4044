"""What W&B shows of a run besides its metrics: plan, transfer report, pictures, checkpoints with their lineage, scores.

The artifact `model-ID` is the last checkpoint of the phase whose W&B run has that ID. The run of the next phase, and of
every fine-tuning, uses it; offline, where W&B cannot record that, the config of the run names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ssl_c2f.core.files import read_json
from ssl_c2f.core.run_folder import PhaseFolder, RunFolder
from ssl_c2f.curriculum.phases import Phase
from ssl_c2f.track.tracker import Tracker
from ssl_c2f.track.wandb_run import Identity, TrackingOptions, WandbRun, read_facts
from ssl_c2f.train.state import Run
from ssl_c2f.train.weights import results_folder

if TYPE_CHECKING:
    from wandb import Run as LiveRun

Json = Mapping[str, Any]
_MOST_ROWS = 1000  # of a table
_SLOWEST = 2e6  # bytes per second: an upload that is slower is not waited for
_UPLOADED = ("model.safetensors", "ema.safetensors", "state.json")  # not the optimiser state


def make_tracker(run: Run, phase: Phase, step: int, note: Callable[[str], object]) -> Tracker | None:
    """The main process's tracker of one phase; metrics.jsonl is cut back to `step`."""
    if not run.dist.is_main:
        return None
    folder, options = run.phase_folder(phase), run.options.tracking
    config = run.options.model_dump(mode="json") | {
        "phase": phase.name, "geometry": phase.geometry.to_dict(),
        "plan": read_json(run.folder.plan), "source": source_of(run, phase),
    }
    identity = Identity(
        run.folder.path, folder.wandb_id, options.name or run.group, f"{run.kind}/{phase.name}",
        run.folder.label if run.kind == "finetune" else "", config,
    )
    return Tracker(options, identity, phase=phase.name, resume_step=step, note=note)


def source_of(run: Run, phase: Phase) -> dict[str, Any]:
    """What the phase starts from: the checkpoint's folder, and the artifact that holds it; {} if from scratch."""
    if phase.index > 0:
        newest = run.phase_folder(run.curriculum.phases[phase.index - 1]).newest()
        return source(newest) if newest else {}
    return source(Path(run.initial.origin)) if run.initial else {}


def source(folder: Path) -> dict[str, Any]:
    """A checkpoint's folder, and the artifact that holds it where it was tracked."""
    facts = _facts_of(folder)
    return {"checkpoint": str(folder)} | ({"artifact": artifact_name(facts["id"]), **facts} if facts else {})


def artifact_name(run_id: str) -> str:
    return f"model-{run_id}"


def group_of(ckpt: str) -> str:
    """The W&B group for what is done with a checkpoint: that of its run, or the name of an imported file."""
    origin = Path(ckpt).resolve()
    return str(_facts_of(origin).get("group") or results_folder(origin).name)


def _facts_of(checkpoint: Path) -> dict[str, Any]:
    """What W&B knows of the phase that a checkpoint lies in."""
    phase = PhaseFolder.of(checkpoint)
    return read_facts(phase.path) if phase else {}


def show_phase(tracker: Tracker, run: Run, phase: Phase) -> None:
    """Log the results of a phase to W&B at its end."""
    folder, kind = run.phase_folder(phase), run.options.tracking.artifacts
    if pictures := read_json(folder.pictures / "pictures.json"):  # in the row of the last record
        tracker.publish(lambda live: live.log(_pictures(folder.pictures, pictures), commit=False))
    plan, transfer = read_json(run.folder.plan), read_json(folder.transfer)
    axes = run.curriculum.counters(phase.last_step)
    tracker.publish(lambda live: live.log(_tables(plan, transfer) | axes))
    newest = folder.newest()
    if newest and kind != "none":
        facts: dict[str, Any] = {
            "phase": phase.name, "step": phase.last_step,
            "geometry": phase.geometry.to_dict(), "source": source_of(run, phase),
        }
        size = sum(file.stat().st_size for file in _files(newest)) if kind == "upload" else 0
        tracker.publish(lambda live: _use(live, facts["source"]))
        tracker.publish(lambda live: _show_checkpoint(live, newest, facts, kind, size / _SLOWEST), size / _SLOWEST)


def _pictures(folder: Path, facts: Json) -> dict[str, Any]:
    """View -> its images, one for each clip."""
    import wandb

    views = dict.fromkeys(view for clip in facts["clips"] for view in clip["pictures"])
    masked = f", {facts['mask_ratio']:.0%} masked" if facts.get("mask_ratio") else ""
    place = f"{facts['frame_ms']:g} ms frames, {' x '.join(map(str, facts['grid']))} tokens{masked}"
    return {
        f"pictures/{view}": [
            wandb.Image(str(folder / clip["pictures"][view]), caption=f"{clip['clip']}: {place}")
            for clip in facts["clips"] if view in clip["pictures"]
        ]
        for view in views
    }


def _tables(plan: Json, transfer: Json) -> dict[str, Any]:
    """The plan, and the transfer report of the phase."""
    found: dict[str, Any] = {}
    if phases := plan.get("phases"):
        columns = [name for name, value in phases[0].items() if not isinstance(value, dict)]
        found["plan"] = _table(columns, ([_cell(p[name]) for name in columns] for p in phases))
    if tensors := transfer.get("tensors"):
        found["transfer"] = _table(list(tensors[0]), (map(_cell, t.values()) for t in tensors))
        found |= {f"transfer/{action}": count for action, count in transfer["count"].items()}
    return found


def _show_checkpoint(live: LiveRun, folder: Path, facts: Json, kind: str, seconds: float) -> None:
    """Log a checkpoint as an artifact of the run."""
    import wandb

    artifact = wandb.Artifact(artifact_name(live.id), "model", metadata=dict(facts))
    for file in _files(folder):
        if kind == "upload":
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        else:
            # no checksum, since reading gigabytes would delay the end of a phase: its path identifies it
            artifact.add_reference(file.resolve().as_uri(), checksum=False)
    live.log_artifact(artifact, aliases=[f"step-{facts['step']}"])
    if not live.offline and kind == "upload":
        artifact.wait(timeout=max(1, round(seconds)))


def _use(live: LiveRun, came_from: Json) -> None:
    """Record the artifact that the run started from, if the server knows it. The run's config names it in any case."""
    import wandb

    if live.offline or "artifact" not in came_from:
        return
    place = f"{came_from.get('entity') or live.entity}/{came_from['project']}/{came_from['artifact']}:latest"
    try:
        live.use_artifact(place)
    except (ValueError, wandb.Error):  # its run was offline, for instance
        live.config["source_not_on_server"] = place


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in _UPLOADED if (folder / name).exists()]


def show_scores(
    ckpt: str, folder: Path, kind: str, result: Json, options: TrackingOptions | None = None,
    note: Callable[[str], object] = print,
) -> None:
    """Log the scores of a checkpoint that were written to `folder` to W&B; repeated, they update the same W&B run.

    `kind` (finetune, evaluate, probe) is the type of the job. Without `options` those of the checkpoint's run hold, if
    it was tracked.
    """
    origin = Path(ckpt).resolve()
    came_from = {} if result.get("from_scratch") else source(origin)
    options = options or (_tracking_of(origin) if "artifact" in came_from else None)
    if options is None:
        return
    config = {key: value for key, value in result.items() if isinstance(value, str | bool | int)}
    identity = Identity(
        folder, folder / "wandb_id", group_of(ckpt), f"{kind}/scores", folder.name, config | {"source": came_from}
    )
    live = WandbRun(options, identity, lambda _: None, note)
    live.publish(lambda run: _use(run, came_from))
    live.publish(lambda run: run.log(_score_row(result)))
    live.finish()


def _tracking_of(origin: Path) -> TrackingOptions | None:
    """The options of the run that a checkpoint lies in; None if it is in none."""
    run = RunFolder.of(origin)
    try:
        config = yaml.safe_load(run.config.read_text()) if run else {}
        return TrackingOptions.model_validate(config["tracking"], strict=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _score_row(result: Json) -> dict[str, Any]:
    """The scores, and tables of them: per fold, confusion, per class, probes."""
    numbers = {key: value for key in ("accuracy", "map", "auc", "d_prime") if (value := result.get(key)) is not None}
    if interval := result.get("interval"):
        name = "accuracy" if "accuracy" in result else "map"
        numbers |= {f"{name}_low": interval[0], f"{name}_high": interval[1]}
    tables: dict[str, tuple[Sequence[str], list[list[Any]]]] = {}
    if folds := result.get("folds"):
        names = list(next(iter(folds.values())))
        tables["folds"] = ("fold", *names), [[fold, *map(values.get, names)] for fold, values in folds.items()]
    if confusion := result.get("confusion"):
        classes = result["classes"]
        rows = [[name, *row] for name, row in zip(classes, confusion, strict=True)]
        tables["confusion"] = ("is / predicted", *classes), rows
    per_class = result.get("recall") or result.get("average_precision")
    if per_class:
        tables["classes"] = ("class", "recall" if "recall" in result else "average precision"), list(
            map(list, per_class.items())
        )
    if probes := result.get("rows"):
        columns = ("features", "readout", "linear", "linear std", "knn", "knn std")
        tables["probe"] = columns, [
            [row["features"], row["readout"], *(row[k][v] for k in ("linear", "knn") for v in ("mean", "std"))]
            for row in probes
        ]
    return numbers | {name: _table(*table) for name, table in tables.items()}


def _table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Any:
    import wandb

    data = [list(row) for _, row in zip(range(_MOST_ROWS), rows, strict=False)]
    return wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value)
