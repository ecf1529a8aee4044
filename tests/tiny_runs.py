"""A run that takes a second and uses everything random, for tests of bit-exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_c2f.core import options
from ssl_c2f.core.files import read_jsonl
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.train.recipe import RunOptions

OF_TIME = ("train_seconds", "clips_per_second", "data_wait")  # the metrics that differ between two equal runs

DEFAULTS: dict[str, Any] = {
    "audio": {"clip_seconds": 0.8, "num_mels": 32},
    "model": {"width": 16, "depth": 2, "heads": 2, "patch_f": 16, "patch_t": 4, "drop_path": 0.3},
    "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    "augment": {"mixup_prob": 0.5, "freq_mask": 4, "time_mask_seconds": 0.1},
    "ema": 0.9,
    "phases": [
        {"name": "coarse", "steps": 2, "time_factor": 4, "batch_size": 8, "warmup_steps": 1},
        {"name": "middle", "steps": 2, "time_factor": 2, "batch_size": 8},
        {"name": "fine", "steps": 2, "batch_size": 8},
    ],
    "train": {"device": "cpu", "log_every": 1, "max_batch_per_device": 4, "rehearse": False},
    "evaluation": {"max_clips": 6, "mask_draws": 1},
    "tracking": {"wandb": "off"},
}


def run_options(root: Path, *overrides: str, model: type[RunOptions] = RunOptions) -> RunOptions:
    """Options of the tiny run over the recordings in `root`, fold 5 held out."""
    return options.load(model, None, overrides, DEFAULTS | {"data": {"root": str(root), "val_folds": [5]}})


def records(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without those metrics that measure time."""
    return [{key: value for key, value in record.items() if key not in OF_TIME}
            for record in read_jsonl(RunFolder(run).metrics)]


def training_steps(run: Path) -> list[int]:
    return [record["step"] for record in records(run) if "grad_norm" in record]


def checkpoints(run: Path) -> list[Path]:
    """The newest checkpoint of each phase."""
    return [found for phase in RunFolder(run).phases() if (found := phase.newest())]


def weights(run: Path) -> dict[str, bytes]:
    """Name -> content of all files of each phase's last checkpoint, except the state, which holds a time."""
    return {
        f"{folder.relative_to(run)}/{file.name}": file.read_bytes()
        for folder in checkpoints(run) for file in sorted(folder.iterdir()) if file.suffix != ".json"
    }
