"""Files: written whole or not at all, and read even where a crash cut them short."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from ssl_c2f.core.options import UserError

_STALE = 60.0  # seconds after which nobody is still writing a temporary file


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder.

    Raises:
        UserError: it cannot be written; the old content stands.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))  # file names may hold bytes that are not UTF-8


def write_json(path: Path, content: Any) -> None:
    """As `write_text`, as JSON that people can read."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """As `write_text`, a table."""
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    write_text(path, table.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        write_through(temporary, content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {reason(error)}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `path` at the end of a `with` statement, and is gone if that is left early.

    Raises:
        UserError: there is something at `path`, or it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: there is something; give a new folder")
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        _sweep(path)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two may write at once


def _sweep(path: Path) -> None:
    """Remove what processes left that were killed while they wrote `path`. Others may be writing it at this moment."""
    for stale in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _STALE:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def own(path: str, flags: int) -> int:
    """An opener for `open`: what a run goes on writing is its own file, and no link that leads elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def reason(error: OSError) -> str:
    """What to say of an error of the system's."""
    if error.errno == errno.ELOOP:
        return "it is a link; a run writes to files of its own"
    return error.strerror or str(error)


def write_through(path: Path, content: bytes) -> None:
    """Write a file onto the disk itself, past the system's buffers. Raises OSError."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, flushed.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", opener=own) as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def read_bytes(file: Path) -> bytes:
    """The content of a file of a run's own; b"" if it is missing, or a link: that may lead to somebody else's file."""
    try:
        with open(file, "rb", opener=own) as stream:
            return stream.read()
    except OSError:
        return b""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is missing, a link, half-written or holds something else."""
    try:
        content = json.loads(read_bytes(file))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without those that are damaged; [] if it is missing or a link."""
    records = []
    for line in read_bytes(file).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def as_dict(value: Any) -> dict[str, Any]:
    """A part of what was read from JSON, if it is an object; else {}."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    """The objects in a part of what was read from JSON, if it is a list; else []."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
