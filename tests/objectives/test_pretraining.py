"""Each objective through three phases: resuming at every step, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import go, open_job, to_the_end_in_steps
from paths import ROOT
from tiny_runs import checkpoints, records, run_options, training_steps, weights
from trained_runs import write_sounds

from ssl_c2f.core import checkpoint, options
from ssl_c2f.data.synthetic import CLASSES, write_dataset
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.latent import spread_of
from ssl_c2f.tasks import config
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.state import Run
from ssl_c2f.train.validate import validate
from ssl_c2f.train.weights import load_weights

COMPRESSIONS = ("frame_shift", "pool_mean", "patch")
SMALL = {
    "ssast": "objective={name: ssast, passes: two}",
    "latent": "objective={name: latent, views: 2, decay: [0.5, 0.9], decoder_width: 8, decoder_depth: 1,"
              " decoder_groups: 2}",
    "views": "objective={name: views, seconds: 0.4, decoder_width: 8, decoder_heads: 2}",
    "supervised": "objective={name: supervised}",
}
VIEWS = ("augment={time_stretch: [0.7, 1.4], gain_db: 6, mix_prob: 1.0}", "train.max_batch_per_device=8")


@pytest.mark.parametrize(
    "compression", ["patch", *(pytest.param(c, marks=pytest.mark.slow) for c in ("frame_shift", "pool_mean"))]
)
@pytest.mark.parametrize("name", SMALL)
def test_interrupted_equals_straight(name: str, compression: str, sounds: Path, tmp_path: Path) -> None:
    more = VIEWS if name == "views" else ()
    o = run_options(
        sounds, SMALL[name], f"compression={compression}", "model.positions=learned", "mask.size=[1,2]", *more
    )
    whole, parts = go(o, tmp_path / "whole"), tmp_path / "parts"
    assert to_the_end_in_steps(o, parts) == 3
    assert weights(whole) == weights(parts) and len(weights(whole)) == 9
    assert records(whole) == records(parts)
    assert training_steps(parts) == [1, 2, 3, 4, 5, 6]
    if name == "latent":
        first, last = (checkpoint.load(folder).model for folder in (checkpoints(whole)[0], checkpoints(whole)[-1]))
        teacher = "teacher.blocks.0.attn.qkv.weight"
        assert not first[teacher].equal(last[teacher]) and not last[teacher].equal(last["encoder" + teacher[7:]])


def test_the_teachers_decay_rises_once_in_a_run_and_not_in_every_phase(sounds: Path, tmp_path: Path) -> None:
    """At the ramp's end the teacher stands still: from the second phase on, which begins behind it."""
    o = run_options(sounds, SMALL["latent"], "objective.decay=[0.5,1.0]", "objective.decay_ramp=0.3")
    coarse, middle, fine = (checkpoint.load(folder).model for folder in checkpoints(go(o, tmp_path)))
    for part, stands in (("teacher", True), ("encoder", False)):
        name = f"{part}.blocks.0.attn.qkv.weight"
        assert coarse[name].equal(middle[name]) == middle[name].equal(fine[name]) == stands
    name = "blocks.0.attn.qkv.weight"
    assert not coarse[f"teacher.{name}"].equal(coarse[f"encoder.{name}"])


def debug_options(name: str, root: Path, *overrides: str) -> RunOptions:
    file = ROOT / f"configs/debug/{name}.yaml"
    model = config.TrainOptions if name == "supervised" else config.PretrainOptions
    return options.load(model, file, [f"data.root={root}", *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["mae", "ssast", "latent", "views", "supervised"])
def test_debug_configs_run_three_phases(name: str, compression: str, sounds: Path, tmp_path: Path) -> None:
    o = debug_options(name, sounds, f"compression={compression}")
    lines = records(go(o, tmp_path))
    assert [line["step"] for line in lines if "grad_norm" in line] == list(range(1, 19))
    kind = "val/accuracy" if name == "supervised" else "val/knn_accuracy"
    scores: list[dict[str, Any]] = [line for line in lines if kind in line]
    assert len(scores) == 3
    assert all(("val/loss" in line) == (name in ("mae", "ssast")) for line in scores)
    wanted = {"supervised": {"input"}, "latent": {"input", "kept"}}.get(name, {"input", "kept", "reconstruction"})
    for phase in ("0-coarse", "1-middle", "2-fine"):
        shown = {file.stem.partition("-")[2] for file in (tmp_path / "phases" / phase / "pictures").glob("*.png")}
        assert shown == wanted
    whole = weights(tmp_path)
    parts = tmp_path / "parts"
    to_the_end_in_steps(o, parts)
    assert weights(parts) == whole


LARGER: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", "decoder_width": 32, "decoder_depth": 1},
    "ssast": {"name": "ssast"},
    "latent": {"name": "latent", "decay": [0.99, 0.999], "decoder_width": 32, "decoder_depth": 3, "decoder_groups": 8},
    "supervised": {"name": "supervised"},
}


def larger(name: str, root: Path, phases: list[dict[str, Any]], **more: Any) -> RunOptions:
    return options.load(RunOptions, None, (), {
        "data": {"root": str(root)}, "objective": LARGER[name], "mask": {"size": [1, 2]}, "phases": phases,
        "train": {"rehearse": False, "device": "cpu", "log_every": 1}, "evaluation": {"knn": 5},
        "tracking": {"wandb": "off"}, **more,
    })


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_32_clips_are_learned_by_heart(name: str, tmp_path: Path) -> None:
    root = write_sounds(tmp_path / "sounds", tuple(list(CLASSES)[:8]), per_class=4)
    o = larger(
        name, root, [{"name": "only", "steps": 200, "batch_size": 32, "lr": 3e-3, "warmup_steps": 20}],
        audio={"sample_rate": 8000, "clip_seconds": 0.5, "num_mels": 32},
        model={"width": 64, "depth": 3, "heads": 4, "patch_f": 8, "patch_t": 4},
    )
    lines = records(go(o, tmp_path / "run"))
    first = lines[0]
    last = {key: sum(line[key] for line in lines[-10:]) / 10 for key in first if key != "phase"}
    assert last["loss"] < 0.4 * first["loss"]
    if name == "ssast":
        assert last["nce_accuracy"] > 3 / last["nce_k"] and last["nce"] < last["nce_chance"] - 0.5
        assert last["mse"] < 0.35
    if name == "latent":
        assert last["std_of_l2_normalized"] > 0.5 * first["std_of_l2_normalized"]
    if name == "supervised":
        assert first["accuracy"] < 0.5 and last["accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.timeout(900)  # 450 steps: half a minute where nobody else works, and many where somebody does
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_latent_prediction_does_not_collapse(compression: str, tmp_path: Path) -> None:
    """A falling loss says nothing here: that of a constant teacher falls fastest."""
    write_dataset(tmp_path / "sounds", clips_per_class=20, seconds=1.0)
    phases = [{"name": f"c{c}", "steps": 150, "batch_size": 32, "lr": 5e-3, "warmup_steps": 20, "time_factor": c}
              for c in (4, 2, 1)]
    o = larger(
        "latent", tmp_path / "sounds", phases, audio={"clip_seconds": 1.0, "num_mels": 64}, compression=compression,
        model={"width": 64, "depth": 3, "heads": 4, "patch_f": 16, "patch_t": 8},
    )
    lines = records(go(o, tmp_path / "run"))
    spread = [line["std_of_l2_normalized"] for line in lines]
    print(f"{compression}: spread {spread[0]:.4f}, at the end {sum(spread[-20:]) / 20:.4f}")
    job = open_job(o, tmp_path / "run")
    trained = load_weights(checkpoints(tmp_path / "run")[-1], "model").at_full_resolution()
    found, random = measured(trained, job), [measured(untrained(job, seed), job) for seed in range(3)]
    print(f"{compression}: (spread, kNN accuracy) {found}, of random encoders {random}")
    assert sum(spread[-20:]) / 20 > 0.5 * spread[0]
    assert found[0] > 0.5 * max(spread for spread, _ in random)
    assert found[1] > max(accuracy for _, accuracy in random)


def untrained(job: Run, seed: int) -> Objective:
    torch.manual_seed(seed)
    return job.options.build(job.options.fine_geometry, job.corpus.num_classes).eval()


def measured(objective: Objective, job: Run) -> tuple[float, float]:
    """Spread of the features of all clips, and the accuracy of their nearest neighbours."""
    runner = job.runner(job.options.fine_geometry)
    spread = spread_of(torch.cat([objective.embed(batch) for batch in runner.batches(job.corpus.training, per_clip=1)]))
    return float(spread), validate(objective, job.options, runner)["val/knn_accuracy"]
