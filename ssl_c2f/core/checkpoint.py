"""Checkpoints: folders that are either complete or absent.

checkpoints/
  step-00000123/
    model.safetensors      weights of the objective (encoder and heads)
    ema.safetensors        their moving average, where one is kept
    state.json             what the caller needs to resume
    optimizer.pt           read back with weights_only=True
    checksums.json         CRC-32 of each of them: a disk that returns other bits is noticed (earlier versions had none)
  damaged-step-00000100/   one that could not be read any more when the run went on; diverged-...: of a run that had
                           diverged. Never read, for people to look at
  .tmp-step-00000456/      a save or a removal that was interrupted: never read, removed by the next save
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ssl_c2f.core.files import one_line, write_through
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import checkpoints_in, newest_in

CHECKSUMS = "checksums.json"
_OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Checkpoint:
    """What `load` finds in a folder; all tensors are on the CPU."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]
    optimizer: dict[str, Any] | None


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`; return its folder.

    `tensors` holds state dicts by file name: {"model": {...}, "ema": {...}}. Whatever happens in here, older
    checkpoints stay readable until the new one is on the disk. A checkpoint of the same step that exists is left as it
    is: resuming is exact, so it has the same content, and replacing a folder could not be atomic.

    Raises:
        UserError: it cannot be written (disk full, read-only folder); nothing half-written is left behind.
    """
    target, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    if target.exists():
        return target
    files = _serialise(tensors, state, optimizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        for name, data in files.items():
            write_through(temporary / name, data)
        _sync_folder(temporary)
        temporary.rename(target)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f" ({sum(map(len, files.values())) / 1e6:.1f} MB needed)"
        raise UserError(f"cannot write the checkpoint {target}: {reason}") from error
    for old in checkpoints_in(folder)[:-keep]:
        doomed = old.rename(folder / f".tmp-{old.name}")  # first the name, so that a removal cut short shows nowhere
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def load(path: Path, *, training: bool = True) -> Checkpoint:
    """Read the checkpoint folder `path`; without `training` the optimiser's state is not looked at.

    Raises:
        UserError: a file is missing or damaged.
    """
    _verify(path, training)
    ema, optimizer = path / "ema.safetensors", path / _OPTIMIZER
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path / 'state.json'}: {one_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path / 'state.json'} is no checkpoint's state")
    return Checkpoint(
        model=load_tensors(path / "model.safetensors"),
        ema=load_tensors(ema) if ema.exists() else None,
        state=state,
        optimizer=_load_optimizer(optimizer) if training and optimizer.exists() else None,
    )


def set_aside_damaged(folder: Path) -> list[str]:
    """Rename the newest checkpoints that cannot be read, up to one that can; returns a line about each of them.

    Whoever goes on from the one before writes the same steps again: resuming is exact.
    """
    lines = []
    while newest := newest_in(folder):
        try:
            load(newest)
            break
        except UserError as error:
            aside = set_aside(newest, "damaged")
            before = newest_in(folder)
            goes_on = f"going on from {before.name}" if before else "none is left in this phase"
            lines.append(f"{error}; set aside as {aside.name}, {goes_on}")
    return lines


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint to WHY-step-N, which nobody reads; returns that."""
    aside = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _verify(path: Path, training: bool) -> None:
    """Compare the files with their checksums, where there are any. Raises UserError."""
    if not (path / CHECKSUMS).exists():
        return
    try:
        expected = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        files = {name: str(crc) for name, crc in expected.items() if training or name != _OPTIMIZER}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"cannot read {path / CHECKSUMS}: {one_line(error)}") from error
    for name, crc in files.items():
        try:
            found = _crc(path / name)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path / name}: {one_line(error)}") from error
        if found != crc:
            raise UserError(f"{path / name} is damaged: its checksum is {found}, and was {crc} when it was written")


def _crc(file: Path) -> str:
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors file, on the CPU.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error


def load_published(file: Path) -> dict[str, Tensor]:
    """The weights in a file that others made, on the CPU: safetensors, or what torch.save wrote.

    Unpickling can run code. Only tensors, plain containers and argparse.Namespace (AudioMAE keeps its settings in one)
    are built from it; anything else is refused before it runs.

    Raises:
        UserError: it is damaged, holds more than data, or no weights.
    """
    if file.suffix == ".safetensors":
        return load_tensors(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol; what is not understood is an error anyway
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows as RuntimeError, UnpicklingError, EOFError, KeyError, ...
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{file} is refused: besides weights it holds {found[1]}; nothing of it was run") from None
        raise UserError(f"{file} cannot be read as weights and plain data: {one_line(error)}") from None
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: no weights in it")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{file}: no weights in it")
    return tensors


def _load_optimizer(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows as RuntimeError, UnpicklingError, EOFError, KeyError, ...
        raise UserError(f"cannot read {file}: {one_line(error)}") from error
    return state


def _serialise(
    tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], optimizer: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """File name -> content. In memory first: torch.save to a full disk raises a RuntimeError that does not say why."""
    files = {"state.json": json.dumps(dict(state), indent=1).encode()}
    for name, named in tensors.items():
        # Cloned because safetensors refuses tensors that share memory, as tied weights do.
        copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in named.items()}
        files[f"{name}.safetensors"] = safetensors.torch.save(copies)
    if optimizer is not None:
        buffer = io.BytesIO()
        torch.save(dict(optimizer), buffer)
        files[_OPTIMIZER] = buffer.getvalue()
    checksums = {name: f"{zlib.crc32(data):08x}" for name, data in files.items()}
    return files | {CHECKSUMS: json.dumps(checksums, indent=1).encode()}


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
