"""The run folder: where things are, who writes them, and what made them.

runs/NAME/
  config.yaml  provenance.json  plan.json  metrics.jsonl  bad_files.jsonl  lock
  phases/0-coarse/    checkpoints/  pictures/  transfer.json  wandb_id  wandb.json  done
  finetune/NAME/
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ssl_c2f.core.options import UserError

PACKAGES = ("ssl_c2f", "torch", "torchaudio", "timm", "lightly", "numpy")
_SECRET = re.compile(r"(?i)^[\w.-]*(key|token(?!s)|secret|passw)[\w.-]*$")
_IN_URL = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")
_GLANCE = 0.3  # seconds: one that only looks whether a run is locked holds the lock for an instant
_locks: set[int] = set()  # descriptors of the locks that this process holds


@dataclass(frozen=True)
class PhaseFolder:
    """The folder of one phase."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def transfer(self) -> Path:
        return self.path / "transfer.json"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def done(self) -> Path:
        return self.path / "done"

    def mark_done(self, step: int, **facts: Any) -> None:
        """Say that the phase has ended, at `step` of the run; `facts` (JSON) are kept with it."""
        write_text(self.done, json.dumps({"step": step, **facts}) + "\n")

    def is_done(self) -> bool:
        return self.done.exists()


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: this one folder."""

    path: Path

    @classmethod
    def create(cls, path: Path, config_text: str) -> RunFolder:
        """The run in `path`. A new one gets its folder, config.yaml and provenance.json; an old one is left alone.

        Raises:
            UserError: the folder cannot be made or written.
        """
        run = cls(path)
        if not run.config.exists():
            write_text(run.provenance, json.dumps(provenance(), indent=1) + "\n")
            write_text(run.config, config_text)
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_files(self) -> Path:
        return self.path / "bad_files.jsonl"

    def phase(self, index: int, name: str) -> PhaseFolder:
        return PhaseFolder(self.path / "phases" / f"{index}-{name}")

    def num_phases(self) -> int:
        """How many phases the run was begun with.

        Raises:
            UserError: config.yaml is not a run's.
        """
        try:
            return len(yaml.safe_load(self.config.read_text())["phases"])
        except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.config} is not the config of a run: choose another run_dir") from None

    def check_config(self, text: str, allowed: Collection[str] = ()) -> None:
        """Refuse to go on with another config than the run was started with.

        `allowed` are patterns of dotted keys that may differ: {"tracking.*", "phases.*.batch_size"}.

        Raises:
            UserError: naming the first keys that differ.
        """
        old, new = _flatten(yaml.safe_load(self.config.read_text())), _flatten(yaml.safe_load(text))
        changed = [
            f"{key} was {old.get(key, '-')}, now {new.get(key, '-')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, "-") != new.get(key, "-") and not any(fnmatchcase(key, pattern) for pattern in allowed)
        ]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(f"{self.path} holds a run with other options: {'; '.join(changed[:3])}{more}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[dict[str, Any] | None]:
        """Be the only writer of this folder. Yields the holder that died without letting go, if there was one.

        The operating system drops the lock of a process that dies, however it dies.

        Raises:
            UserError: someone else holds it (named), or the folder cannot be written.
        """
        file = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from error
        try:
            _take(descriptor, file)
            _locks.add(descriptor)
            previous = _holder(file)
            _rewrite(descriptor, {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()})
            try:
                yield previous
            finally:  # whoever gets here lets go, only a process that is killed does not
                _rewrite(descriptor, None)
        finally:
            _locks.discard(descriptor)
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder.

    Raises:
        UserError: it cannot be written; the old content stands.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))  # file names may hold bytes that are not UTF-8


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table whole or not at all; raises as `write_text`."""
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    write_text(path, table.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two may write at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, flushed.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """What made a run, as JSON: code, versions, hardware, and the command without secrets; the host is not named."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "started": _now(),
        "command": redact(sys.argv if command is None else command),
        "commit": _commit(),
        "versions": versions,
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        },
    }


def redact(command: Sequence[str]) -> list[str]:
    """The command with what looks like a secret hidden: `api_key=***`, `--token ***`, `https://user:***@host`."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = bool(_SECRET.match(name))
        shown.append("***" if hide_next else f"{name}=***" if secret and equals else _IN_URL.sub(r"\1***@", word))
        hide_next = secret and not equals and word.startswith("-")
    return shown


def command_line(command: Sequence[str]) -> str:
    """What to type to have a command of a provenance again."""
    path, words = Path(*command[:1]), command[1:]
    own = path.name == "ssl_c2f" or path.parts[-2:] == ("ssl_c2f", "__main__.py")
    return shlex.join(["ssl_c2f", *words] if own else ["python", *command] if command else [])


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty` after changes; None if it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # the repository around a site-packages folder is someone else's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}"""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= _flatten(value, f"{prefix}{key}.")
    return leaves or {prefix.removesuffix("."): tree}


def _take(descriptor: int, file: Path) -> None:
    until = time.monotonic() + _GLANCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        except OSError as error:
            raise UserError(f"cannot lock {file}: {error.strerror}") from error
    holder = _holder(file) or {"pid": "?", "host": "?", "started": "?"}
    raise UserError(
        f"{file.parent} is being written by process {holder['pid']} on {holder['host']} since {holder['started']}"
    )


def _holder(file: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(file.read_text())
    except ValueError:  # empty: the last holder let go; half a line: it died while writing
        return None
    return holder


def _rewrite(descriptor: int, content: dict[str, Any] | None) -> None:
    """Who holds the lock is only for people: on a full disk it goes unsaid. The file keeps its block, so that the next
    holder needs no space."""
    data = b"\n" if content is None else json.dumps(content).encode()
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))


def _close_locks() -> None:
    """A forked child (a loader worker) shares the lock, and would hold it on after its parent was killed."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
