"""Supervised training from coarse to fine against a single phase of as many epochs, on the folds of ESC-10.

    python benchmarks/supervised.py --root FOLDER [--backbones ast htsat] [--seeds 0 1 2] [--epochs 16]

After the supervised experiments of Feng et al. (ICASSP 2024, arXiv 2401.08415) with AST and HTS-AT, with small encoders
of 64 mel bins, from random weights; each of the official five folds is held out in turn. Both methods have the same
number of epochs, peak learning rate, batch size and augmentation; coarse to fine trains half of the epochs at time
factor 4 and a quarter each at 2 and at 1. The accuracy is that of the last weights at full resolution: nothing is
selected on the held-out fold.
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

FOLDS = (1, 2, 3, 4, 5)
# (fraction of the epochs, time factor) of each phase
CURRICULA = {"single phase": [(1.0, 1)], "c2f": [(0.5, 4), (0.25, 2), (0.25, 1)]}
BACKBONES: dict[str, dict[str, Any]] = {
    "ast": {
        "audio": {"clip_seconds": 5.0, "num_mels": 64},
        "model": {"width": 96, "depth": 4, "heads": 4, "class_tokens": 2},
        "objective": {"name": "supervised", "head": "ast", "label_smoothing": 0.1},
    },
    "htsat": {
        "audio": {"clip_seconds": 5.0, "num_mels": 64, "f_min": 50.0},
        "model": {"name": "htsat", "widths": [24, 48, 96, 192], "depths": [1, 1, 2, 2], "heads": [1, 2, 4, 8]},
        "objective": {"name": "supervised", "label_smoothing": 0.1},
    },
}


def recipe(root: str, backbone: str, method: str, fold: int, seed: int, epochs: float) -> dict[str, Any]:
    return BACKBONES[backbone] | {
        "seed": seed, "data": {"root": root, "val_folds": [fold]},
        "augment": {"mixup_prob": 0.5, "freq_mask": 24, "time_mask_seconds": 0.96},
        "optim": {"lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.999]},
        "phases": [
            {"name": f"c{factor}", "epochs": fraction * epochs, "time_factor": factor, "batch_size": 32,
             "warmup_epochs": 2 if i == 0 else 0.5}
            for i, (fraction, factor) in enumerate(CURRICULA[method])
        ],
        "evaluation": {"every": 1000.0},
        "train": {"checkpoint_every": 10**6, "log_every": 20, "rehearse": False},
        "tracking": {"wandb": "off"},
    }


def measure(root: str, backbone: str, method: str, seed: int, epochs: float) -> dict[str, Any]:
    """The accuracy of each fold, and the FLOPs and seconds of training on all of them."""
    accuracies, tflops, seconds = [], 0.0, 0.0
    for fold in FOLDS:
        folder = Path(tempfile.mkdtemp(prefix="supervised-"))
        try:
            made = options.load(RunOptions, None, (), recipe(root, backbone, method, fold, seed, epochs))
            engine.run(made, folder, kind="train")
            last = [record for record in read_jsonl(RunFolder(folder).metrics) if "val/accuracy" in record][-1]
        finally:
            shutil.rmtree(folder)
        accuracies.append(last["val/accuracy"])
        tflops, seconds = tflops + last["flops"] / 1e12, seconds + last["train_seconds"]
    return {"folds": accuracies, "accuracy": statistics.mean(accuracies), "tflops": tflops, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of ESC-10")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=16.0)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    a = parser.parse_args()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {b: {m: [] for m in CURRICULA} for b in a.backbones}
    for seed in a.seeds:
        for backbone, methods in results.items():
            for method, runs in methods.items():
                runs.append(measure(a.root, backbone, method, seed, a.epochs))
                print(f"seed {seed}  {backbone:6s} {method:12s} {runs[-1]}", flush=True)
    print(f"\naccuracy over 5 folds, mean ± std over {len(a.seeds)} seeds; {a.epochs:g} epochs")
    for backbone, methods in results.items():
        for method, runs in methods.items():
            means = [run["accuracy"] for run in runs]
            spread = statistics.stdev(means) if len(means) > 1 else float("nan")
            print(
                f"{backbone:6s} {method:12s} {statistics.mean(means):.3f} ± {spread:.3f}  "
                f"{runs[0]['tflops']:.2f} TFLOPs  {statistics.mean(run['seconds'] for run in runs):.0f} s"
            )
    if a.out:
        a.out.write_text(json.dumps({"epochs": a.epochs, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
