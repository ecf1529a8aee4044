"""The loss before and after the transfer from a coarse to a fine patch: PI-resized against interpolated kernels.

    python benchmarks/patch_transfer.py --root FOLDER [--factors 2 4] [--epochs 20] [--out patch_transfer.json]

Trains one coarse phase with `compression: patch` on folds 1 to 4 of ESC-10 and evaluates it on fold 5: in its own
geometry and after the transfer to the fine patch, with raw targets, the same clips and mask ratio, and 20 draws of
masks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ssl_c2f.core import options
from ssl_c2f.curriculum import transfer as transfers
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.curriculum.transfer import transfer
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.runner import Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives import Objective
from ssl_c2f.train import engine
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.weights import load_weights

DRAWS, RATIO = 20, 0.75


def recipe(root: str, factor: int, epochs: float, val_folds: list[int]) -> dict[str, Any]:
    return {
        "compression": "patch", "audio": {"clip_seconds": 5.0}, "data": {"root": root, "val_folds": val_folds},
        "model": {"width": 128, "depth": 4, "heads": 4},
        "objective": {"name": "mae", "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 4},
        "mask": {"ratio": RATIO}, "train": {"log_every": 50}, "tracking": {"wandb": "off"},
        "phases": [{"name": "coarse", "epochs": epochs, "time_factor": factor, "batch_size": 32, "lr": 1.5e-3,
                    "warmup_epochs": epochs / 10}],
    }


@torch.no_grad()
def loss(objective: Objective, statistics: InputStatistics, geometry: Geometry) -> float:
    """The mean loss over the held-out clips and all draws of masks."""
    runner = Runner(statistics.corpus, statistics.front_end(geometry), 50)
    masking = Masking("uniform", RATIO, (1, 1))
    total = count = 0.0
    for draw in range(DRAWS):
        for batch in runner.batches(runner.corpus.held_out, per_clip=1, masking=masking, draw=draw):
            total, count = total + float(objective(batch).loss) * len(batch.spec), count + len(batch.spec)
    return total / count


def plain_kernel(weight: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """The kernel interpolated like an image: the baseline that PI-resize is compared with."""
    return F.interpolate(weight.unflatten(1, (1, *old)), size=new, mode="bilinear", antialias=True).flatten(1)


def measure(root: str, factor: int, epochs: float, val_folds: list[int]) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="patch-transfer-"))
    try:
        o = options.load(RunOptions, None, (), recipe(root, factor, epochs, val_folds))
        engine.run(o, folder)
        weights = load_weights(folder)
        corpus = Corpus.open(o.data, o.seed)
    finally:
        shutil.rmtree(folder)
    objective, statistics = weights.objective(), InputStatistics(corpus, weights.statistics)
    result = {"coarse": loss(objective, statistics, weights.geometry)}
    exact = transfers.resize_kernel
    for name, resize in (("pi_resize", exact), ("interpolation", plain_kernel)):
        fine = o.build(o.fine_geometry, corpus.num_classes)
        transfers.resize_kernel = resize
        fine.load_state_dict(transfer(weights.tensors, weights.geometry, fine.state_dict(), o.fine_geometry)[0])
        transfers.resize_kernel = exact
        result[name] = loss(fine.eval(), statistics, o.fine_geometry)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of ESC-10")
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    a = parser.parse_args()
    results = {}
    for factor in a.factors:
        results[f"C{factor}"] = r = measure(a.root, factor, a.epochs, [5])
        print(
            f"C = {factor}: loss {r['coarse']:.3f} in the coarse geometry; at the fine patch {r['pi_resize']:.3f} with "
            f"PI-resize, {r['interpolation']:.3f} with plain interpolation", flush=True,
        )
    if a.out:
        a.out.write_text(json.dumps({"epochs": a.epochs, "draws": DRAWS, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
