"""Run folders made by hand, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PHASES = ("coarse", "middle", "fine")
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c6360606000000004000160e7274b"
    "0000000049454e44ae426082"
)


def make_run(path: Path, steps: int = 30, **changes: Any) -> Path:
    """A complete run of three phases with every file of a run. `changes`: phases (names), loss (a factor)."""
    names, factor = changes.get("phases", PHASES), changes.get("loss", 1.0)
    path.mkdir(parents=True)
    write(path / "config.yaml", f"seed: 0\nphases: [{', '.join(names)}]\nnote: {path.name}\n")
    write(path / "provenance.json", {"command": ["ssl_c2f", "pretrain"], "commit": "abc", "versions": {"torch": "2"},
                                     "hardware": {"cores": 2, "gpus": []}, "started": "2026-01-01"})
    each = steps // len(names)
    plan = [{"name": n, "steps": each, "hop_ms": 10.0, "grid": [8, 8], "tokens": 64, "kept": 16, "batch_size": 4,
             "clips": each * 4, "pflops": each * 1e-3} for n in names]
    write(path / "plan.json", {"phases": plan, "share_of_single_phase": 0.5})
    lines = []
    for step in range(1, steps + 1):
        name = names[min((step - 1) // each, len(names) - 1)]
        axes = {"phase": name, "step": step, "samples": 4 * step, "tokens": 64 * step, "flops": step * 1e12,
                "train_seconds": step / 10}
        loss = factor * (0.2 + math.exp(-3 * step / steps)) + 0.05 * math.sin(step)
        lines.append(axes | {"loss": loss, "lr": 1e-3, "mask_ratio": 0.75, "grad_norm": 1.0})
        if step % each == 0:
            lines.append(axes | {"val/loss": loss, "val/knn_accuracy": step / steps / 2})
    write(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for i, name in enumerate(names):
        folder, end = path / "phases" / f"{i}-{name}", (i + 1) * each
        write(folder / "done", {"step": end, "samples": 4 * end, "flops": end * 1e12, "train_seconds": end / 10})
        if i:
            moved = [{"name": "encoder.a", "action": "copied", "detail": ""},
                     {"name": "encoder.patch_embed.weight", "action": "resized", "detail": "pseudo-inverse"}]
            write(folder / "transfer.json", {"from": "before", "count": {"copied": 1, "resized": 1}, "tensors": moved})
        write(folder / "pictures" / "0-input.png", PIXEL)
        write(folder / "pictures" / "0.mp3", b"\xff\xfb")
        write(folder / "pictures" / "pictures.json", {
            "frame_ms": 10.0, "grid": [8, 8], "mask_ratio": 0.75, "mask_shape": "uniform",
            "clips": [{"clip": "dog/1.wav", "pictures": {"input": "0-input.png"}, "sound": "0.mp3"}],
        })
    write(path / "finetune" / "default" / "scores.json", {
        "accuracy": 0.875, "interval": [0.7, 0.9], "folds": {"1": {"accuracy": 0.8}, "2": {"accuracy": 0.95}},
        "classes": ["cat", "dog"], "confusion": [[3, 1], [0, 4]], "recall": {"cat": 0.75, "dog": 1.0},
        "from_scratch": False,
    })
    score = {"mean": 0.5, "std": 0.1}
    write(path / "probe" / "esc" / "probe.json", {
        "clips": 8, "split": "2 folds",
        "rows": [{"features": "checkpoint", "readout": "mean", "linear": score, "knn": score}],
    })
    return path


def write(file: Path, content: str | bytes | dict[str, Any]) -> None:
    """Write a file, making its folder; a dict as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
