"""Files: written whole or not at all, and read even where a crash cut them short."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ssl_c2f.core.options import UserError


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two may write at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_through(temporary, content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error


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
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is missing, half-written or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without those that a crash cut short; [] if it is missing."""
    if not file.exists():
        return []
    records = []
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
