"""Coarse to fine against a single phase at equal FLOPs, on ESC-10: validation loss at full resolution.

    python benchmarks/equal_flops.py --root FOLDER [--seeds 0 1 2] [--budget 1.0] [--lr 5e-4] [--out equal_flops.json]

A ViT of width 128 and depth 6, trained on folds 1 to 4 and validated on fold 5 (statistics of the fine input, raw
targets, mask ratio 0.75, fixed masks averaged over several draws). Every method has the same FLOPs, batch size and peak
learning rate, and its learning rate ends at zero. The methods of a seed run one after another in one process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ssl_c2f.core import options
from ssl_c2f.core.files import read_jsonl
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.train import engine
from ssl_c2f.train.recipe import RunOptions

# (fraction of the FLOPs, time factor) of each phase
CURRICULA = {"single": [(1.0, 1)], "c2f": [(0.4, 4), (0.35, 2), (0.25, 1)]}
METHODS = {
    "single phase": ("single", "frame_shift"),
    "c2f, frame shift": ("c2f", "frame_shift"),
    "c2f, mean pooling": ("c2f", "pool_mean"),
}


def recipe(root: str, method: str, budget: float, seed: int, lr: float) -> dict[str, Any]:
    curriculum, compression = METHODS[method]
    return {
        "seed": seed, "compression": compression, "audio": {"clip_seconds": 5.0},
        "data": {"root": root, "val_folds": [5]},
        "model": {"width": 128, "depth": 6, "heads": 4},
        "objective": {"name": "mae", "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 4},
        "mask": {"ratio": 0.75},
        "optim": {"lr": lr},
        "phases": [
            {"name": f"c{factor}", "flops": fraction * budget, "time_factor": factor, "batch_size": 8,
             "warmup_epochs": 0.5 if i == 0 else 0.1, "min_lr_ratio": 0.0 if factor == 1 else 0.5}
            for i, (fraction, factor) in enumerate(CURRICULA[curriculum])
        ],
        "evaluation": {"every": 1000.0, "mask_draws": 8},
        "train": {"checkpoint_every": 10**6, "log_every": 20, "rehearse": False},  # the dry run would add FLOPs
        "tracking": {"wandb": "off"},
    }


def measure(root: str, method: str, budget: float, seed: int, lr: float) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="equal-flops-"))
    try:
        engine.run(options.load(RunOptions, None, (), recipe(root, method, budget, seed, lr)), folder)
        last = [record for record in read_jsonl(RunFolder(folder).metrics) if "val/loss" in record][-1]
    finally:
        shutil.rmtree(folder)
    return {
        "loss": last["val/loss"], "knn": last.get("val/knn_accuracy", float("nan")), "samples": last["samples"],
        "tflops": last["flops"] / 1e12, "seconds": last["train_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of ESC-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=1.0, help="TFLOPs of a run")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate of every phase")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    a = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {method: [] for method in a.methods}
    for seed in a.seeds:
        for method in a.methods:
            results[method].append(measure(a.root, method, a.budget * 1e12, seed, a.lr))
            print(f"seed {seed}  {method:18s} {results[method][-1]}", flush=True)
    base = results[a.methods[0]]
    for method, runs in results.items():
        ratios = [run["loss"] / single["loss"] - 1 for run, single in zip(runs, base, strict=True)]
        print(
            f"{method:18s} loss {statistics.mean(r['loss'] for r in runs):.4f} "
            f"({', '.join(f'{r:+.1%}' for r in ratios)} against {a.methods[0]}), kNN "
            f"{statistics.mean(r['knn'] for r in runs):.3f}, {runs[0]['samples']:.0f} samples, "
            f"{statistics.mean(r['seconds'] for r in runs):.0f} s"
        )
    if a.out:
        a.out.write_text(json.dumps({"budget_tflops": a.budget, "lr": a.lr, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
