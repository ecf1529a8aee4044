"""A W&B run that never disturbs training: online if its server answers soon, else offline; delays by seconds at most.

Everything that it logs is on the disk already (metrics.jsonl, pictures, checkpoints). So when the server or W&B's own
process is lost, all of it is written once more as a complete offline run under the same id, which `wandb sync` uploads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
    """A W&B run, and what to do where it fails. Nothing raises here.

    `replay` logs to a new or resumed run all records that are on the disk, from its `starting_step` on.
    """

    def __init__(
        self, options: TrackingOptions, identity: Identity, replay: Call, note: Callable[[str], object]
    ) -> None:
        self.options, self.identity, self.replay, self.note = options, identity, replay, note
        self.run: Run | None = None
        self._done: list[Call] = []  # what an offline copy repeats
        self._reported = self._lost = False
        if options.wandb != "off":
            with self._harmless():
                self.run = self._start()
                replay(self.run)

    def call(self, what: Call) -> None:
        """Do something that returns at once, such as logging a record."""
        if self.run is not None and not self._lost:
            with self._harmless():
                what(self.run)

    def publish(self, what: Call, seconds: float = 0.0) -> None:
        """Do something that may ask the server (tables, artifacts); after `timeout_seconds` + `seconds` it is lost."""
        self._done.append(what)
        if self.run is None or self._lost:
            return
        if self.run.offline:
            self.call(what)
        else:
            thread = threading.Thread(target=self.call, args=(what,), daemon=True)
            thread.start()
            thread.join(self.options.timeout_seconds + seconds)
            self._lost = thread.is_alive()

    def finish(self, exit_code: int = 0) -> None:
        """End the run; if the server did not take all of it in time, write a complete offline copy."""
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
        with contextlib.suppress(Exception):  # W&B's service may already be dead
            wandb.teardown(exit_code)
        with self._harmless():
            run = _init(self.options, self.identity, "offline")
            for call in (self.replay, *self._done):
                call(run)
            run.finish(exit_code=exit_code)

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

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Report the first error of W&B's, and raise none."""
        try:
            yield
        except Exception as error:
            if not self._reported:
                self.note(f"W&B failed ({one_line(error)}); the run goes on, and its folder has every record")
            self._reported = True


def _init(options: TrackingOptions, identity: Identity, mode: Any) -> Run:
    import wandb

    if not identity.id_file.exists() or not identity.id_file.read_text().strip():
        write_text(identity.id_file, secrets.token_hex(4) + "\n")
    run_id, online = identity.id_file.read_text().strip(), mode == "online"
    # An offline run holds everything from the start: it replaces the offline copies of before an interruption.
    for old in identity.folder.glob(f"wandb/offline-run-*-{run_id}") if not online else ():
        shutil.rmtree(old, ignore_errors=True)
    # W&B prints nothing, blocks the end of a run only briefly, and collects no code, environment or command line.
    settings = wandb.Settings(
        mode=mode, init_timeout=options.timeout_seconds, finish_timeout=options.timeout_seconds,
        finish_timeout_raises=True, silent=True, console="off", disable_git=True, disable_code=True,
        disable_job_creation=True, save_code=False, x_disable_meta=True, x_save_requirements=False,
    )
    run = wandb.init(
        dir=identity.folder, project=options.project, entity=options.entity, group=identity.group,
        job_type=identity.job_type, name=f"{identity.group} {identity.job_type} {identity.label}".strip(),
        tags=options.tags, config=dict(identity.config), id=run_id,
        resume="allow" if online else None,  # `wandb sync` must not append an offline run to what the server has
        reinit="create_new", allow_val_change=True, settings=settings,
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
