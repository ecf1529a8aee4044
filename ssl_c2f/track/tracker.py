"""Metrics of a run: every record as a flushed line of metrics.jsonl, and to W&B where that works.

The file is the reference. W&B gets the same records, one W&B run per phase, as rows whose number follows from the step.
When a run is resumed, W&B's server gets the records that it lacks, and no record twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ssl_c2f.core.files import own, read_jsonl, reason
from ssl_c2f.core.options import UserError
from ssl_c2f.core.signals import Interrupted
from ssl_c2f.track.wandb_run import Call, Identity, TrackingOptions, WandbRun

if TYPE_CHECKING:
    from wandb import Run


class Tracker:
    """Takes the records of one phase; only rank 0 has one. Errors of W&B are reported, not raised."""

    def __init__(
        self,
        options: TrackingOptions,
        identity: Identity,
        *,
        phase: str,
        resume_step: int | None,
        note: Callable[[str], object] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        """Open metrics.jsonl in the identity's folder, and its W&B run, which gets the records of `phase`.

        `resume_step` is the step of the checkpoint that training goes on from (0: from the start; None: the file is
        only added to): lines of later steps are cut off, since training will write them again. `note` prints a line.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        self.path = identity.folder / "metrics.jsonl"
        self.phase = phase
        try:
            identity.folder.mkdir(parents=True, exist_ok=True)
            self.last = cut_back(self.path, resume_step)
            self._file = open(self.path, "a", encoding="utf-8", opener=own)  # noqa: SIM115 (closed by finish)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {reason(error)}") from error
        self.wandb = WandbRun(options, identity, self._replay, note)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.finish(0 if error is None else 128 + error.signum if isinstance(error, Interrupted) else 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one record, which should hold `phase`, `step` and the AXES.

        A value that is not finite becomes null in the file, beside `<key>_nonfinite`.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        record = {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}
        try:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.last = record
        self.wandb.call(lambda run: _send(run, record))

    def validated(self, step: int) -> bool:
        """Whether the step's validation has been logged."""
        return self.last.get("step") == step and is_validation(self.last)

    def publish(self, what: Call, seconds: float = 0.0) -> None:
        """Give the W&B run more than records (a table, an artifact), if there is one; see `WandbRun.publish`."""
        self.wandb.publish(what, seconds)

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and the W&B run; calling it again does nothing."""
        with contextlib.suppress(OSError):  # a full disk, which `log` has reported
            self._file.close()
        self.wandb.finish(exit_code)

    def _replay(self, run: Run) -> None:
        for record in read_jsonl(self.path):
            if record.get("phase") == self.phase:
                _send(run, _as_logged(record))


def _send(run: Run, record: Mapping[str, Any]) -> None:
    """Log a record as the row of its step: each step is logged, and validated, at most once. (Line numbers of the file
    do not serve: after a rollback a run may continue with another `log_every`.)"""
    row = 2 * int(record["step"]) + is_validation(record)
    if row >= run.starting_step:
        run.log(dict(record), step=row)


def is_validation(record: Mapping[str, Any]) -> bool:
    """Whether the record is of validation rather than of training."""
    return any(name.startswith("val/") for name in record)


def _as_logged(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record that `_finite` made a line of."""
    odd = {key.removesuffix("_nonfinite"): float(v) for key, v in record.items() if key.endswith("_nonfinite")}
    return {key: value for key, value in record.items() if not key.endswith("_nonfinite")} | odd


def cut_back(file: Path, step: int | None) -> dict[str, Any]:
    """Cut `file` behind its last whole line of `step` or before (None: of any); the last record left, or {}.

    Lines before it that are damaged stay: readers pass over them, and what stands behind them is no less true.
    """
    last: dict[str, Any] = {}
    end = at = 0
    if not file.exists():
        return last
    with open(file, "rb+", opener=own) as stream:
        for line in stream:
            at += len(line)
            record = _record(line) if line.endswith(b"\n") else None
            if record and (step is None or record["step"] <= step):
                last, end = record, at
        stream.truncate(end)
    return last


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """{"loss": nan} -> {"loss": None, "loss_nonfinite": "nan"}: strict JSON has no such numbers."""
    plain: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            plain |= {key: None, f"{key}_nonfinite": str(value)}
        else:
            plain[key] = value
    return plain
