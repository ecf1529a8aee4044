"""Two processes compute the same as one: after 20 steps they differ only by the order of sums in float32."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import checkpoints, records, run_options, weights
from torch import nn

from ssl_c2f.core import checkpoint, options
from ssl_c2f.data.front_end import Batch
from ssl_c2f.objectives.latent import Latent
from ssl_c2f.objectives.mae import MAE
from ssl_c2f.objectives.ssast import SSAST
from ssl_c2f.train import engine
from ssl_c2f.train.recipe import RunOptions

pytestmark = pytest.mark.slow

OPTIONS = (
    "phases.0.steps=7", "phases.1.steps=7", "phases.2.steps=6", "model.drop_path=0", "data.cache_gb=0",
    "evaluation.every=0.5", "train.checkpoint_every=5",
)


def run_and_hash(o: RunOptions, run: Path) -> list[str]:
    """Hashes of the input (a crop, mixed and augmented) and the mask of every clip that this process trains on."""
    seen: list[str] = []

    def look(module: nn.Module, inputs: tuple[Batch, ...]) -> None:
        if isinstance(module, MAE | SSAST | Latent) and module.training:
            for spec, kept in zip(inputs[0].spec, inputs[0].masks[0].kept, strict=True):
                seen.append(hashlib.sha256(spec.numpy().tobytes() + kept.numpy().tobytes()).hexdigest())

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    engine.run(o, run)
    handle.remove()
    return seen


def torchrun(o: RunOptions, run: Path) -> list[list[str]]:
    """What each of two processes sees."""
    config = run.with_suffix(".yaml")
    config.write_text(options.dump(o))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, config, run], env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{run}-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_repeat_each_other_and_stay_with_one(sounds: Path, tmp_path: Path) -> None:
    o = run_options(sounds, *OPTIONS)
    torchrun(o, tmp_path / "validated")
    o = o.model_copy(update={"evaluation": o.evaluation.model_copy(update={"every": 0.0})})
    rank_0, rank_1 = torchrun(o, tmp_path / "two")
    assert weights(tmp_path / "two") == weights(tmp_path / "validated")  # by one process, which changed nothing
    steps = [record for record in records(tmp_path / "validated") if "loss" in record]
    assert steps == records(tmp_path / "two") and len(steps) < len(records(tmp_path / "validated"))

    alone = run_and_hash(o, tmp_path / "one")
    together = [clip for i in range(0, 80, 4) for clip in rank_0[i : i + 4] + rank_1[i : i + 4]]
    assert together == alone and len(set(alone)) == 160
    models = [checkpoint.load(checkpoints(tmp_path / name)[-1]).model for name in ("one", "two")]
    apart = max(float((models[0][name] - models[1][name]).abs().max()) for name in models[0])
    print(f"largest difference after 20 steps: {apart:.1e}")
    assert apart < 1e-4  # 0 where one process has one thread too
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        "{name: ssast, passes: two}",
        "{name: latent, views: 2, decay: [0.5, 0.9], decoder_width: 8, decoder_depth: 1, decoder_groups: 2}",
        "{name: views, seconds: 0.4, decoder_width: 8, decoder_heads: 2}",
        "{name: views, seconds: 0.4, contrast: vicreg, reconstruction: 0}",
    ],
    ids=["ssast", "latent", "views", "views vicreg"],
)
def test_other_objectives_do_the_same_on_two(objective: str, sounds: Path, tmp_path: Path) -> None:
    of_views = ("augment={gain_db: 6, mix_prob: 1.0}", "train.max_batch_per_device=8") if "views," in objective else ()
    o = run_options(sounds, *OPTIONS, f"objective={objective}", "evaluation.every=0", *of_views)
    torchrun(o, tmp_path / "two")
    run_and_hash(o, tmp_path / "one")
    models = [checkpoint.load(checkpoints(tmp_path / name)[-1]).model for name in ("one", "two")]
    assert models[0].keys() == models[1].keys()
    apart = max(float((models[0][name] - models[1][name]).abs().max()) for name in models[0])
    print(f"largest difference after 20 steps: {apart:.1e}")
    assert apart < 1e-3  # 0 where one process has one thread too
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def main(config: str, run: str) -> None:
    seen = run_and_hash(options.load(RunOptions, Path(config)), Path(run))
    Path(f"{run}-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
