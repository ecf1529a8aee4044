"""Tiny recordings, and tiny models trained on them for a few steps."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ssl_c2f.core import options
from ssl_c2f.data.synthetic import render
from ssl_c2f.train import engine
from ssl_c2f.train.recipe import RunOptions

CLASSES = ("chirp_down", "chirp_up", "clicks_slow")
RATE = 8000


def write_sounds(folder: Path, classes: tuple[str, ...] = CLASSES, per_class: int = 5, seconds: float = 0.5) -> Path:
    """Synthetic recordings in a sub-folder per class, dealt out over five folds."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            soundfile.write(folder / name / f"{i % 5 + 1}-{i}-A.wav", render(name, i, seconds, RATE), RATE)
    return folder


def train(folder: Path, root: Path, **objective: Any) -> Path:
    """A run of four steps in `folder`, on the recordings in `root`, with fold 5 held out."""
    options_of_run = options.load(RunOptions, None, (), {
        "data": {"root": str(root), "val_folds": [5]},
        "audio": {"sample_rate": RATE, "clip_seconds": 0.5, "num_mels": 32},
        "model": {"width": 16, "depth": 1, "heads": 2, "patch_f": 16, "patch_t": 8},
        "objective": objective, "phases": [{"name": "only", "steps": 4, "batch_size": 8, "lr": 1e-2}],
        "train": {"rehearse": False, "device": "cpu"}, "tracking": {"wandb": "off"},
    })
    engine.run(options_of_run, folder)
    return folder


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def of(model: Any, root: Path, **values: Any) -> Any:
    """Options of a command, for the recordings in `root`."""
    return options.load(model, None, (), {"data": {"root": str(root)}, "device": "cpu", **values})


def damage(folder: Path, name: str) -> None:
    """Write audio with a valid header and samples that are NaN."""
    soundfile.write(folder / name, np.full(4000, np.nan, np.float32), RATE, subtype="FLOAT")
