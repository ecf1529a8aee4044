"""Finding and opening the weights that `--ckpt` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_c2f import checkpoint
from ssl_c2f.data.front_end import Statistics
from ssl_c2f.geometry import Geometry
from ssl_c2f.objectives import Objective
from ssl_c2f.options import UserError
from ssl_c2f.recipe import RunOptions

Which = Literal["auto", "model", "ema"]


@dataclass(frozen=True)
class Weights:
    """Trained weights and what they need to be used."""

    state: Mapping[str, Tensor]
    geometry: Geometry
    origin: str
    statistics: Mapping[str, Statistics] = field(default_factory=dict)  # by Geometry.digest()
    options: Mapping[str, Any] = field(default_factory=dict)  # audio, model, objective, ... that made them
    classes: tuple[str, ...] = ()
    step: int = 0


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, its model.safetensors, a phase (its newest), or a run (the
    newest of its furthest phase).

    Raises:
        UserError: there is none.
    """
    if path.is_file() and (path.parent / "state.json").exists():
        return path.parent
    if (path / "state.json").exists():
        return path
    phases = sorted((path / "phases").glob("*-*"), key=lambda p: int(p.name.partition("-")[0]))
    for folder in [path, *reversed(phases)]:
        if found := checkpoint.newest(folder / "checkpoints"):
            return found
    if not path.exists():
        raise UserError(f"--ckpt {path}: no such file or folder")
    if path.is_file():
        raise UserError(f"--ckpt {path}: not a checkpoint of ssl_c2f (no state.json beside it)")
    folds = sorted(folder.name for folder in path.glob("fold-*"))
    hint = f"; choose one of its folds: {', '.join(folds)}" if folds else " yet"
    raise UserError(f"--ckpt {path}: no checkpoint in it{hint}")


def load_weights(path: Path, which: Which = "auto") -> Weights:
    """Open a checkpoint; `auto` takes the moving average where there is one.

    Raises:
        UserError: no checkpoint there, it is damaged, or it has no moving average.
    """
    folder = find_checkpoint(path)
    saved = checkpoint.load(folder)
    if which == "ema" and saved.ema is None:
        raise UserError(f"{folder} has no moving average of the weights: use weights=model")
    state = saved.state
    try:
        return Weights(
            state=saved.ema if saved.ema is not None and which != "model" else saved.model,
            geometry=Geometry(**state["geometry"]), origin=str(folder),
            statistics={digest: Statistics(**values) for digest, values in state["statistics"].items()},
            options=state["options"], classes=tuple(state["classes"]), step=state["step"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} is not of this version of ssl_c2f ({error})") from None


def run_options(weights: Weights) -> RunOptions:
    """The options that made the weights; the phases are not theirs."""
    return RunOptions.model_validate({**weights.options, "phases": [{"name": "any", "steps": 1}]}, strict=False)


def rebuild(weights: Weights, device: torch.device | str = "cpu") -> Objective:
    """The objective that was trained, in the geometry that it was trained in, ready for inference."""
    objective = run_options(weights).build(weights.geometry, len(weights.classes))
    objective.load_state_dict(weights.state)
    return objective.to(device).eval()
