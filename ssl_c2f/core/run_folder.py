"""The run folder: where every file of a run is, and who may write it. No other module derives one path from another.

runs/NAME/
  config.yaml  provenance.json  plan.json  recordings.json  metrics.jsonl  bad_files.jsonl  jobs.json  lock
  statistics/
  phases/0-coarse/    checkpoints/step-00000123/  pictures/  transfer.json  wandb_id  wandb.json  done
  finetune/NAME/      fold-1/, ...: a run folder for each fold
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ssl_c2f.core import locks
from ssl_c2f.core.files import one_line, write_json, write_text
from ssl_c2f.core.options import UserError, differences
from ssl_c2f.core.provenance import provenance


class _Inside:
    """A path within a folder, as an attribute of a class that has a `path`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: PhaseFolder | RunFolder, owner: type) -> Path:
        return folder.path / self.name


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first. Changes nothing, so it is safe beside a running job."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_in(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder."""
    return next(reversed(checkpoints_in(folder)), None)


@dataclass(frozen=True)
class PhaseFolder:
    """The folder of one phase, INDEX-NAME."""

    path: Path

    checkpoints = _Inside("checkpoints")
    pictures = _Inside("pictures")
    transfer = _Inside("transfer.json")
    wandb_id = _Inside("wandb_id")
    done = _Inside("done")

    @classmethod
    def of(cls, checkpoint: Path) -> PhaseFolder | None:
        """The phase (or the folder that `ssl_c2f convert` wrote) that a checkpoint lies in; None for other files."""
        return cls(checkpoint.parents[1]) if checkpoint.parent.name == "checkpoints" else None

    @property
    def index(self) -> int:
        return int(self.path.name.partition("-")[0])

    @property
    def name(self) -> str:
        return self.path.name.partition("-")[2]

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return newest_in(self.checkpoints)

    def since(self, step: int) -> list[Path]:
        """The checkpoints of `step` and later."""
        return [path for path in checkpoints_in(self.checkpoints) if int(path.name.removeprefix("step-")) >= step]

    def mark_done(self, step: int, **facts: Any) -> None:
        """Record that the phase has ended, at `step` of the run; `facts` (JSON) are kept with it."""
        write_text(self.done, json.dumps({"step": step, **facts}) + "\n")

    def is_done(self) -> bool:
        return self.done.exists()


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: this one folder."""

    path: Path

    config = _Inside("config.yaml")
    provenance = _Inside("provenance.json")
    plan = _Inside("plan.json")
    recordings = _Inside("recordings.json")
    diverged = _Inside("diverged.json")  # once the run has: from then on its learning rate may be changed
    metrics = _Inside("metrics.jsonl")
    bad_files = _Inside("bad_files.jsonl")
    jobs = _Inside("jobs.json")
    lock_file = _Inside("lock")

    @classmethod
    def create(cls, path: Path, config_text: str) -> RunFolder:
        """The run in `path`. A new one gets its folder, config.yaml and provenance.json; an old one is left alone.

        Raises:
            UserError: the folder cannot be made or written.
        """
        run = cls(path)
        if not run.config.exists():
            write_json(run.provenance, provenance())
            write_text(run.config, config_text)
        return run

    @classmethod
    def of(cls, checkpoint: Path) -> RunFolder | None:
        """The run that a checkpoint of one of its phases lies in; None for other files."""
        phase = PhaseFolder.of(checkpoint)
        return cls(phase.path.parents[1]) if phase and phase.path.parent.name == "phases" else None

    @property
    def label(self) -> str:
        """What tells the run from others of its W&B group: for a fold NAME/fold-1, else the folder's name."""
        parts = self.path.parts
        return "/".join(parts[parts.index("finetune") + 1 :] if "finetune" in parts else parts[-1:])

    def statistics(self, digest: str) -> Path:
        return self.path / "statistics" / f"{digest}.json"

    def phase(self, index: int, name: str) -> PhaseFolder:
        return PhaseFolder(self.path / "phases" / f"{index}-{name}")

    def phases(self) -> list[PhaseFolder]:
        """The phases that have begun, in order: of those that the config names, where it can be read. Somebody's copy
        of a phase is none."""
        found = [path for path in (self.path / "phases").glob("*-*") if path.name.partition("-")[0].isdecimal()]
        with contextlib.suppress(OSError, yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
            names = [phase["name"] for phase in yaml.safe_load(self.config.read_text(encoding="utf-8"))["phases"]]
            found = [path for path in found if path.name in {f"{i}-{name}" for i, name in enumerate(names)}]
        return sorted(map(PhaseFolder, filter(Path.is_dir, found)), key=lambda phase: phase.index)

    def newest(self) -> Path | None:
        """The newest checkpoint of the last phase that has one."""
        return next((found for phase in reversed(self.phases()) if (found := phase.newest())), None)

    def finetuning(self, name: str) -> RunFolder:
        """A fine-tuning from this run: a run folder itself, or one for each fold."""
        return RunFolder(self.path / "finetune" / name)

    def fold(self, fold: object) -> RunFolder:
        """A fold of a fine-tuning."""
        return RunFolder(self.path / f"fold-{fold}")

    def folds(self) -> list[RunFolder]:
        """The folds of a fine-tuning that have begun."""
        return [RunFolder(path) for path in sorted(self.path.glob("fold-*"))]

    def num_phases(self) -> int:
        """How many phases the run was begun with.

        Raises:
            UserError: config.yaml is not a run's.
        """
        try:
            return len(yaml.safe_load(self.config.read_text())["phases"])
        except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.config} is not the config of a run: choose another run_dir") from None

    def check_config(self, text: str, allowed: Collection[str] = (), before: str | None = None) -> None:
        """Refuse to continue with another config than the run was started with.

        `allowed` are patterns of dotted keys that may differ: {"tracking.*", "phases.*.batch_size"}. `before` is the
        config that it was started with, if the caller knows more of it than the folder.

        Raises:
            UserError: naming the first keys that differ.
        """
        try:
            found = differences(yaml.safe_load(before or self.config.read_text(encoding="utf-8")), yaml.safe_load(text))
        except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"cannot read {self.config}: {one_line(error)}") from None
        changed = sorted(
            f"{key} was {old}, now {new}" for key, old, new in found
            if not any(fnmatchcase(key, pattern) for pattern in allowed)
        )
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(f"{self.path} holds a run with other options: {'; '.join(changed[:3])}{more}")

    def lock(self) -> AbstractContextManager[dict[str, Any] | None]:
        """Be the only writer of this folder. Yields the last holder if it was killed while it held the lock.

        Raises:
            UserError: another process holds it (named), or the folder cannot be written.
        """
        return locks.hold(self.lock_file, f"{self.path} is being written")
