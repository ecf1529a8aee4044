"""Locks between processes. The operating system drops the lock of a process that dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ssl_c2f.core.files import own, read_json, reason
from ssl_c2f.core.options import UserError
from ssl_c2f.core.provenance import now

_GLANCE = 0.3  # seconds: one that only looks whether a file is locked holds the lock for an instant
_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def hold(file: Path, refusal: str) -> Iterator[dict[str, Any] | None]:
    """Hold the lock of a file, made with its folder. Yields the holder that died with it, if there was one.

    Raises:
        UserError: another holds it (`refusal`, such as "RUN is being written", followed by who does), or the file
            cannot be written or locked.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = own(str(file), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot write {file}: {reason(error)}") from error
    try:
        _take(descriptor, file, refusal)
        _held.add(descriptor)
        previous = read_json(file) or None  # half a line: it died while writing
        _rewrite(descriptor, {"pid": os.getpid(), "host": socket.gethostname(), "started": now()})
        try:
            yield previous
        finally:  # only a process that is killed leaves its name there
            _rewrite(descriptor, None)
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def state(file: Path) -> Literal["", "held", "dead"]:
    """Whether a process holds the lock, or died holding it."""
    try:
        with open(file, encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return "held"
            return "dead" if stream.read().strip() else ""
    except OSError:
        return ""


def _take(descriptor: int, file: Path, refusal: str) -> None:
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
    holder = {"pid": "?", "host": "?", "started": "?"} | read_json(file)
    raise UserError(f"{refusal} by process {holder['pid']} on {holder['host']} since {holder['started']}")


def _rewrite(descriptor: int, content: dict[str, Any] | None) -> None:
    """Who holds the lock is only for people: on a full disk it is left out. The file keeps its block, so that the next
    holder needs no space."""
    data = b"\n" if content is None else json.dumps(content).encode()
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))


def _close_held() -> None:
    """A forked child (a loader worker) shares the lock, and would hold it on after its parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)
