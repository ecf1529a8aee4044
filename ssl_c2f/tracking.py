"""Metrics of a run: every record as a flushed line of metrics.jsonl, and to W&B where that works.

The file is the truth. W&B gets the same records, one W&B run per phase, numbered by their line in the file: a line that
its server already has from before an interruption is not sent again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from ssl_c2f.options import Options, UserError

if TYPE_CHECKING:
    from wandb import Run

AXES = ("samples", "tokens", "flops", "train_seconds")  # what metrics are drawn against: the first unless one chooses


class TrackingOptions(Options):
    """Where metrics go besides metrics.jsonl. `auto`: online if someone is logged in and the server answers."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "ssl_c2f"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    timeout_seconds: float = 10.0

    @field_validator("wandb", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class Tracker:
    """Takes the records of one phase. Only rank 0 has one. Whatever W&B does, nothing but a full disk raises here."""

    def __init__(
        self,
        folder: Path,
        options: TrackingOptions,
        *,
        config: Mapping[str, Any],
        group: str,
        job_type: str,
        run_id_file: Path,
        resume_step: int | None,
        note: Callable[[str], object] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        """Open `folder`/metrics.jsonl and a W&B run of `group`, whose id is kept in `run_id_file`.

        `resume_step` is the step of the checkpoint that training goes on from (0: from the start; None: the file is
        only added to): lines of later steps are cut off, since training will write them again. `note` prints a line.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        self.folder = folder
        self.note = note
        self.run: Run | None = None
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = cut_back(folder / "metrics.jsonl", resume_step)
            self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by finish)
        except OSError as error:
            raise UserError(f"cannot write {folder / 'metrics.jsonl'}: {error.strerror}") from error
        if options.wandb != "off":
            try:
                self.run = _start(folder, options, config, group, job_type, run_id_file, note)
            except Exception as error:
                self._warn(error)

    def log(self, record: Mapping[str, Any], pictures: Mapping[str, Path] | None = None) -> None:
        """Write one record, which should hold `step` and the AXES; W&B also gets `pictures`: name -> image file.

        A value that is not finite becomes null in the file, beside `<key>_nonfinite`.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        record = {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}
        try:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.folder / 'metrics.jsonl'}: {error.strerror}") from error
        line, self._lines = self._lines, self._lines + 1

        def send(run: Run) -> None:
            if line >= run.starting_step:
                images = {name: _image(path) for name, path in (pictures or {}).items()}
                run.log(record | images, step=line)

        self.with_wandb(send)

    def with_wandb(self, call: Callable[[Run], object]) -> None:
        """Do something with the W&B run (a table, an artifact), if there is one; only its first failure is told."""
        if self.run is not None:
            try:
                call(self.run)
            except Exception as error:
                self._warn(error)

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and the W&B run; calling it again does nothing."""
        with contextlib.suppress(OSError):  # a full disk, of which `log` has told
            self._file.close()
        self.with_wandb(lambda run: run.finish(exit_code=exit_code))
        self.run = None

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self.note(f"W&B failed ({reason}); training goes on, and metrics.jsonl has every record")
        self._warned = True


def cut_back(file: Path, step: int | None) -> int:
    """Cut `file` before its first line that is half-written or of a step after `step`; the number of lines left."""
    lines = end = 0
    if not file.exists():
        return 0
    with open(file, "rb+") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or (step is not None and record.get("step", 0) > step):
                break
            lines, end = lines + 1, end + len(line)
        stream.truncate(end)
    return lines


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """{"loss": nan} -> {"loss": None, "loss_nonfinite": "nan"}: strict JSON has no such numbers."""
    plain: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            plain |= {key: None, f"{key}_nonfinite": str(value)}
        else:
            plain[key] = value
    return plain


def _start(
    folder: Path,
    options: TrackingOptions,
    config: Mapping[str, Any],
    group: str,
    job_type: str,
    run_id_file: Path,
    note: Callable[[str], object],
) -> Run:
    """Start or resume the W&B run, offline where online fails."""
    # W&B's reports about itself hold up the end of the process for 20 s where its server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    def init(mode: Any) -> Run:
        return wandb.init(
            dir=folder,
            project=options.project,
            entity=options.entity,
            group=options.name or group,
            job_type=job_type,
            name=f"{options.name or group} {job_type}",
            tags=options.tags,
            config=dict(config),
            id=_run_id(run_id_file),
            resume="allow",
            reinit="create_new",
            allow_val_change=True,
            settings=wandb.Settings(mode=mode, init_timeout=options.timeout_seconds, **_quiet(options)),
        )

    wandb.setup(wandb.Settings(silent=True))
    try:
        run = init(_automatic_mode() if options.wandb == "auto" else options.wandb)
    except Exception as error:
        if options.wandb == "offline":
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        note(f"W&B is offline ({reason}); upload later with: wandb sync {folder / 'wandb'}/offline-run-*")
        wandb.teardown()  # its service holds on to the id of the run that failed
        run = init("offline")
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric=AXES[0])
    return run


def _automatic_mode() -> str:
    """What W&B's own variable says; else online where a login is kept."""
    import wandb

    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")


def _quiet(options: TrackingOptions) -> dict[str, Any]:
    """W&B prints nothing, blocks the end of a run only briefly, and collects no code, environment or command line."""
    return {
        "silent": True,
        "console": "off",
        "finish_timeout": options.timeout_seconds,
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "save_code": False,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }


def _run_id(file: Path) -> str:
    """The W&B id in `file`; a new one is written there first."""
    if not file.exists() or not file.read_text().strip():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()


def _image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))
