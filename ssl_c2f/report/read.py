"""A run folder, however much of it is there. Nothing here raises because of what a crashed run left behind."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_c2f.core import locks
from ssl_c2f.core.files import read_json, read_jsonl
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import PhaseFolder, RunFolder
from ssl_c2f.report.series import Log, read_log

Json = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """One clip in one phase's film strip, as data URIs."""

    name: str
    pictures: dict[str, str]  # view -> image
    sound: str | None


@dataclass(frozen=True)
class PhaseData:
    """What is known of a phase."""

    name: str
    plan: Json = field(default_factory=dict)
    done: Json = field(default_factory=dict)
    transfer: Json = field(default_factory=dict)
    pictures: Json = field(default_factory=dict)
    clips: tuple[Clip, ...] = ()


@dataclass(frozen=True)
class RunData:
    """What is known of a run."""

    name: str
    path: Path
    log: Log
    phases: tuple[PhaseData, ...]
    plan: Json
    provenance: Json
    config: str
    lock: str  # "", "held" or "dead"
    bad_files: int
    tuned: dict[str, Json]  # scores of finetune/NAME
    evaluated: dict[str, Json]  # scores of evaluation/NAME
    probes: dict[str, Json]  # of probe/NAME

    @property
    def scores(self) -> dict[str, Json]:
        """All scores, under names that tell the two apart."""
        return self.tuned | {f"evaluated on {name}": scores for name, scores in self.evaluated.items()}

    @property
    def status(self) -> str:
        if self.lock == "held":
            return "running"
        if self.phases and all(phase.done for phase in self.phases):
            return "complete"
        if not self.log.records:
            return "nothing logged"
        return "crashed" if self.lock == "dead" else "stopped early"

    def end(self, phase: str, axis: str) -> float | None:
        """Where a phase ends (or has got to) on an axis, counted over the whole run."""
        done = next((p.done for p in self.phases if p.name == phase), {})
        value = done.get(axis)
        return float(value) if isinstance(value, int | float) else self.log.last(phase, axis)

    def total(self, axis: str) -> float | None:
        ends = [end for phase in self.phases if (end := self.end(phase.name, axis)) is not None]
        return max(ends) if ends else None

    @property
    def probe(self) -> str | None:
        """The metric of validation that is a probe's score, if there is one."""
        return next((name for name in ("val/knn_accuracy", "val/knn_map") if name in self.log.names), None)

    @property
    def classifier(self) -> str | None:
        """The metric of validation that is a trained classifier's score, if there is one."""
        return next((name for name in ("val/accuracy", "val/map") if name in self.log.names), None)

    @property
    def last_score(self) -> float | None:
        """The last phase's last score of validation: the probe's, or the classifier's."""
        name = self.probe or self.classifier
        return self.log.last(self.phases[-1].name, name) if name and self.phases else None

    @property
    def validation_loss(self) -> str | None:
        return next((name for name in self.log.names if name.startswith("val/") and "loss" in name), None)


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Raises UserError if one of them is no folder."""
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder")
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(path: Path, name: str) -> RunData:
    folder, plan = RunFolder(path), read_json(RunFolder(path).plan)
    log = read_log(folder.metrics)
    return RunData(
        name=name, path=path, log=log, phases=_phases(path, plan, log), plan=plan,
        provenance=read_json(folder.provenance), config=_text(folder.config), lock=locks.state(folder.lock_file),
        bad_files=len(read_jsonl(folder.bad_files)),
        tuned=_by_folder(path, "finetune/*/scores.json"), evaluated=_by_folder(path, "evaluation/*/scores.json"),
        probes=_by_folder(path, "probe/*/probe.json"),
    )


def _by_folder(path: Path, pattern: str) -> dict[str, Json]:
    return {f.parent.name: content for f in sorted(path.glob(pattern)) if (content := read_json(f))}


def _phases(path: Path, plan: Json, log: Log) -> tuple[PhaseData, ...]:
    """In the order of the plan; what it does not name comes behind."""
    plans = {str(p["name"]): p for p in plan.get("phases", []) if isinstance(p, dict) and "name" in p}
    folders = {phase.name: phase for phase in RunFolder(path).phases()}
    names = dict.fromkeys([*plans, *folders, *log.phases])
    return tuple(_phase(name, folders.get(name), plans.get(name, {})) for name in names)


def _phase(name: str, folder: PhaseFolder | None, plan: Json) -> PhaseData:
    if folder is None:
        return PhaseData(name, plan)
    done = read_json(folder.done) or ({"step": None} if folder.is_done() else {})
    pictures = read_json(folder.pictures / "pictures.json")
    clips = []
    for entry in pictures.get("clips", []):
        images = {view: _picture(folder.pictures, file, "image/png") for view, file in entry["pictures"].items()}
        sound = _picture(folder.pictures, entry["sound"], "audio/mpeg") if entry.get("sound") else None
        clips.append(Clip(entry["clip"], {view: image for view, image in images.items() if image}, sound))
    return PhaseData(name, plan, done, read_json(folder.transfer), pictures, tuple(clips))


def _picture(folder: Path, file: str, kind: str) -> str | None:
    """A file of the phase's pictures; a run from elsewhere may name others, which are nobody else's to see."""
    return _data_uri(folder / Path(file).name, kind)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _data_uri(file: Path, kind: str) -> str | None:
    try:
        return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    except OSError:
        return None
