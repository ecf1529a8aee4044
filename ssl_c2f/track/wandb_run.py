"""One W&B run that can do no harm: online where its server answers soon, else offline, and never a delay of more than a
few seconds.

What it is given is on the disk elsewhere (metrics.jsonl, pictures, checkpoints). So whenever the server or W&B's
own process is lost, all of it is written once more, whole, as an offline run under the same id, which `wandb sync`
uploads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ssl_c2f.core.files import one_line, read_json, write_json, write_text
from ssl_c2f.core.options import Options
from ssl_c2f.track import AXES

if TYPE_CHECKING:
    from wandb import Run

FACTS = "wandb.json"  # beside the id: where the run is
_SILENT = "its server did not answer"
_AGAIN = 600.0  # seconds after which a server that did not answer is asked again
_failed: list[float] = []  # when one did not, in this process

Call = Callable[["Run"], object]


class TrackingOptions(Options):
    """Where metrics go besides metrics.jsonl. `auto`: online if someone is logged in and the server answers."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "ssl_c2f"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    timeout_seconds: float = Field(5.0, gt=0, description="how long W&B is waited for at the start, twice at the end")
    artifacts: Literal["reference", "upload", "none"] = Field(
        "reference", description="a phase's last checkpoint as an artifact: where it lies, its weights as well, or none"
    )

    @field_validator("wandb", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false


@dataclass(frozen=True)
class Identity:
    """What a W&B run is called and where it is kept."""

    folder: Path  # W&B makes its wandb/ in it
    id_file: Path  # holds the run's id; FACTS is written beside it
    group: str
    job_type: str
    label: str = ""  # what tells it from others of its group and type
    config: Mapping[str, Any] = field(default_factory=dict)


class WandbRun:
    """A W&B run and what to do where it fails. Nothing raises here.

    `replay` logs everything that is on the disk to a run that has begun, from its `starting_step` on.
    """

    def __init__(
        self, options: TrackingOptions, identity: Identity, replay: Call, note: Callable[[str], object]
    ) -> None:
        self.options, self.identity, self.replay, self.note = options, identity, replay, note
        self.run: Run | None = None
        self._done: list[Call] = []  # what an offline copy repeats
        self._told = self._lost = False
        if options.wandb != "off":
            try:
                self.run = self._start()
                replay(self.run)
            except Exception as error:
                self._tell(error)

    def call(self, what: Call) -> None:
        """Do something that returns at once, such as logging a record."""
        if self.run is not None and not self._lost:
            try:
                what(self.run)
            except Exception as error:
                self._tell(error)

    def publish(self, what: Call, seconds: float = 0.0) -> None:
        """Do something that may ask the server (tables, artifacts); after `timeout_seconds` + `seconds` it is lost."""
        self._done.append(what)
        if self.run is None or self._lost:
            return
        errors: list[Exception] = []

        def work(run: Run) -> None:
            try:
                what(run)
            except Exception as error:
                errors.append(error)

        if self.run.offline:
            work(self.run)
        else:
            thread = threading.Thread(target=work, args=(self.run,), daemon=True)
            thread.start()
            thread.join(self.options.timeout_seconds + seconds)
            self._lost = thread.is_alive()
        for error in errors:
            self._tell(error)

    def finish(self, exit_code: int = 0) -> None:
        """End the run; where not all of it was taken in time, leave a whole copy for `wandb sync`."""
        run, self.run = self.run, None
        if run is None:
            return
        lost = _SILENT if self._lost else ""
        if not lost:
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                lost = _SILENT
            except Exception as error:  # its own process died, perhaps of the signal that ends this one
                lost = one_line(error)
        if lost == _SILENT:
            _failed.append(time.monotonic())
        if lost:
            self._leave_copy(lost, exit_code)

    def _leave_copy(self, reason: str, exit_code: int) -> None:
        import wandb

        self._note_offline(reason)
        with contextlib.suppress(Exception):  # what is gone cannot be told to go
            wandb.teardown(exit_code)
        try:
            run = _init(self.options, self.identity, "offline")
            for call in (self.replay, *self._done):
                call(run)
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._tell(error)

    def _start(self) -> Run:
        """Begin or resume the run, offline where online fails."""
        # W&B's reports about itself hold up the end of the process for 20 s where its server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        mode = _automatic_mode() if self.options.wandb == "auto" else self.options.wandb
        if mode == "online" and _failed and time.monotonic() - _failed[-1] < _AGAIN:
            mode = "offline"
        try:
            return _init(self.options, self.identity, mode)
        except Exception as error:
            if mode == "offline":
                raise
            _failed.append(time.monotonic())
            self._note_offline(one_line(error))
            wandb.teardown()  # its service holds on to the id of the run that failed
            return _init(self.options, self.identity, "offline")

    def _note_offline(self, reason: str) -> None:
        files = f"{self.identity.folder}/wandb/offline-run-*"
        self.note(f"W&B is offline ({reason}); upload later with: wandb sync {files}")

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self.note(f"W&B failed ({one_line(error)}); the run goes on, and its folder has every record")
        self._told = True


def _init(options: TrackingOptions, identity: Identity, mode: Any) -> Run:
    import wandb

    run_id, online = _run_id(identity.id_file), mode == "online"
    if not online:
        _remove_superseded(identity.folder, run_id)
    run = wandb.init(
        dir=identity.folder,
        project=options.project,
        entity=options.entity,
        group=identity.group,
        job_type=identity.job_type,
        name=f"{identity.group} {identity.job_type} {identity.label}".strip(),
        tags=options.tags,
        config=dict(identity.config),
        id=run_id,
        # an offline run holds everything from the start: `wandb sync` is not to add it to what the server has
        resume="allow" if online else None,
        reinit="create_new",
        allow_val_change=True,
        settings=wandb.Settings(mode=mode, init_timeout=options.timeout_seconds, **_quiet(options)),
    )
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="samples")
    facts = {
        "id": run_id, "entity": run.entity or options.entity, "project": options.project,
        "url": None if run.offline else run.url, "group": identity.group, "job_type": identity.job_type,
        "offline": run.offline,
    }
    write_json(identity.id_file.with_name(FACTS), facts)
    return run


def read_facts(folder: Path) -> dict[str, Any]:
    """Where the W&B run of a phase or result is (id, entity, project, url, group, offline); {} if it has none."""
    facts = read_json(folder / FACTS)
    return facts if facts.get("id") else {}


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
        "finish_timeout_raises": True,
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "save_code": False,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }


def _remove_superseded(folder: Path, run_id: str) -> None:
    """Offline copies of the run from before an interruption: the next one holds all that they held."""
    for old in folder.glob(f"wandb/offline-run-*-{run_id}"):
        shutil.rmtree(old, ignore_errors=True)


def _run_id(file: Path) -> str:
    """The W&B id in `file`; a new one is written there first."""
    if not file.exists() or not file.read_text().strip():
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text().strip()
