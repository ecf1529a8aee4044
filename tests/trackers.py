"""A tracker of one phase, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_c2f.track.tracker import Identity, Tracker, TrackingOptions


def track(
    folder: Path, wandb: Any = "off", *, resume_step: int | None = None, timeout_seconds: float = 1.0, **more: Any
) -> Tracker:
    """A tracker of the phase "coarse" in `folder`."""
    identity = Identity(
        folder, folder / "phases/0-coarse/wandb_id", "run", "pretrain/coarse", config={"phases": [{"name": "coarse"}]}
    )
    options = TrackingOptions(wandb=wandb, timeout_seconds=timeout_seconds)
    return Tracker(options, identity, phase="coarse", resume_step=resume_step, **more)
