"""Reads a run folder, however much of it is there: nothing that a crashed run left behind raises an error here."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_c2f.core import locks
from ssl_c2f.core.files import as_dict, as_dicts, read_bytes, read_json, read_jsonl
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import PhaseFolder, RunFolder
from ssl_c2f.report.series import AXES, Log, is_number, read_log

Json = dict[str, Any]
COUNTERS = ("step", *AXES)


@dataclass(frozen=True)
class ClipPictures:
    """One clip as a phase saw it, as data URIs."""

    name: str
    images: dict[str, str]  # view ("input", "reconstruction", ...) -> image
    sound: str | None


@dataclass(frozen=True)
class PhaseData:
    """What is known of a phase."""

    name: str
    folder: PhaseFolder
    done: bool
    end: dict[str, float]  # COUNTERS at the phase's end, or as far as it got; they count over the whole run
    own: dict[str, float]  # COUNTERS of this phase alone
    plan: Json
    transfer: Json
    pictures: Json
    clips: tuple[ClipPictures, ...]


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
        """The scores of fine-tuning and of evaluation."""
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

    def total(self, counter: str) -> float | None:
        """A counter over all phases."""
        return max((phase.end[counter] for phase in self.phases if counter in phase.end), default=None)

    @property
    def probe(self) -> str | None:
        """The metric of validation that is a probe's score, if there is one."""
        return self._logged("val/knn_accuracy", "val/knn_map")

    @property
    def classifier(self) -> str | None:
        """The metric of validation that is a trained classifier's score, if there is one."""
        return self._logged("val/accuracy", "val/map")

    @property
    def validation_loss(self) -> str | None:
        return next((name for name in self.log.names if name.startswith("val/") and "loss" in name), None)

    @property
    def last_score(self) -> float | None:
        """The last phase's last score of validation: the probe's, or the classifier's."""
        name = self.probe or self.classifier
        return self.log.last(self.phases[-1].name, name) if name and self.phases else None

    def _logged(self, *names: str) -> str | None:
        return next((name for name in names if name in self.log.names), None)


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """The runs in these folders; where two folders have the same name, runs are named by their paths.

    Raises:
        UserError: one of them is no folder.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder")
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(path: Path, name: str) -> RunData:
    folder = RunFolder(path)
    log, plan = read_log(folder.metrics), read_json(folder.plan)
    config = read_bytes(folder.config).decode("utf-8", "replace")
    return RunData(
        name=name, path=path, log=log, phases=_phases(path, plan, log), plan=plan,
        provenance=read_json(folder.provenance), config=config, lock=locks.state(folder.lock_file),
        bad_files=len(read_jsonl(folder.bad_files)),
        tuned=_by_folder(path, "finetune/*/scores.json"), evaluated=_by_folder(path, "evaluation/*/scores.json"),
        probes=_by_folder(path, "probe/*/probe.json"),
    )


def _by_folder(path: Path, pattern: str) -> dict[str, Json]:
    return {f.parent.name: content for f in sorted(path.glob(pattern)) if (content := read_json(f))}


def _phases(path: Path, plan: Json, log: Log) -> tuple[PhaseData, ...]:
    """In the order of the plan; phases that it does not name come last."""
    plans = {str(p["name"]): p for p in as_dicts(plan.get("phases")) if "name" in p}
    folders = {folder.name: folder for folder in RunFolder(path).phases()}
    phases: list[PhaseData] = []
    before = dict.fromkeys(COUNTERS, 0.0)
    for name in dict.fromkeys([*plans, *folders, *log.phases]):
        folder = folders.get(name, PhaseFolder(path / "phases" / name))  # the latter does not exist
        phases.append(_phase(name, folder, plans.get(name, {}), log, before))
        before |= phases[-1].end
    return tuple(phases)


def _phase(name: str, folder: PhaseFolder, plan: Json, log: Log, before: Mapping[str, float]) -> PhaseData:
    done, pictures = read_json(folder.done), read_json(folder.pictures / "pictures.json")
    counted = {key: done[key] if is_number(done.get(key)) else log.last(name, key) for key in COUNTERS}
    end = {key: float(value) for key, value in counted.items() if value is not None}
    return PhaseData(
        name=name, folder=folder, done=folder.is_done(), end=end,
        own={key: value - before[key] for key, value in end.items()}, plan=plan,
        transfer=read_json(folder.transfer), pictures=pictures,
        clips=tuple(_clip(folder.pictures, entry) for entry in as_dicts(pictures.get("clips"))),
    )


def _clip(folder: Path, entry: Json) -> ClipPictures:
    """Only files in the phase's own folder: a run from elsewhere could otherwise show any file of whoever reads it."""

    def data_uri(file: object, kind: str) -> str | None:
        content = read_bytes(folder / Path(file).name) if isinstance(file, str) else b""
        return f"data:{kind};base64,{base64.b64encode(content).decode()}" if content else None

    images = {str(view): data_uri(file, "image/png") for view, file in as_dict(entry.get("pictures")).items()}
    found = {view: image for view, image in images.items() if image}
    return ClipPictures(str(entry.get("clip")), found, data_uri(entry.get("sound"), "audio/mpeg"))
