"""A tiny config for slurm/launch.py, and ways to run the launcher."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from paths import ROOT

LAUNCH = ROOT / "slurm" / "launch.py"
CONFIG = """
audio: {clip_seconds: 1.0, num_mels: 32}
model: {width: 16, depth: 1, heads: 2, patch_f: 16, patch_t: 8}
objective: {name: mae, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
phases:
  - {name: coarse, steps: 4, time_factor: 2, batch_size: 8, lr: 1.0e-3}
  - {name: fine, steps: 4, batch_size: 8, lr: 1.0e-3}
train: {device: cpu, rehearse: false}
tracking: {wandb: off}
"""


def launch_module() -> Any:
    """slurm/launch.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("launch", LAUNCH)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(*words: object) -> int:
    """Run slurm/launch.py in this process; its exit status."""
    status: int = launch_module().main([str(word) for word in words])
    return status


def program(file: Path, text: str) -> None:
    """Write an executable file with Python code."""
    file.write_text(f"#!{sys.executable}\n{text}\n")
    file.chmod(0o755)
