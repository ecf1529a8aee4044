"""The training loop: an interrupted run equals an uninterrupted one, whatever is done to it in between."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from disks import mounted
from engine_runs import before, go, one_step, open_job, to_the_end_in_steps, watch
from tiny_runs import checkpoints, records, run_options, training_steps, weights
from torch import nn

from ssl_c2f.core import checkpoint, options
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import RunFolder
from ssl_c2f.core.signals import Interrupted, Stop
from ssl_c2f.data.front_end import Batch
from ssl_c2f.models.vit import ViT
from ssl_c2f.objectives.mae import MAE
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.rehearsal import rehearse
from ssl_c2f.train.state import prepare, snapshot
from ssl_c2f.train.validate import validate


@pytest.fixture(scope="module")
def straight(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as it stands, undisturbed. Not to be written to."""
    return go(run_options(sounds), tmp_path_factory.mktemp("straight"))


# --- going on


@pytest.mark.parametrize(("compression", "cache"), [("frame_shift", "0"), ("patch", "4"), *(
    pytest.param(*each.split(), marks=pytest.mark.slow)
    for each in ("frame_shift 4", "patch 0", "pool_mean 0", "pool_mean 4", "pool_max 0", "pool_max 4")
)])
def test_interrupted_equals_straight(compression: str, cache: str, sounds: Path, tmp_path: Path) -> None:
    o = run_options(sounds, f"compression={compression}", f"data.cache_gb={cache}")
    whole, parts = go(o, tmp_path / "whole"), tmp_path / "parts"
    assert to_the_end_in_steps(o, parts) == 3
    assert weights(whole) == weights(parts) and len(weights(whole)) == 9
    assert records(whole) == records(parts)
    assert training_steps(parts) == [1, 2, 3, 4, 5, 6]


def test_interrupted_equals_straight_with_labels(sounds: Path, tmp_path: Path) -> None:
    o = run_options(sounds, "objective={name: supervised}", "evaluation.every=0.3")
    whole, parts = go(o, tmp_path / "whole"), tmp_path / "parts"
    to_the_end_in_steps(o, parts)
    assert weights(whole) == weights(parts)
    assert records(whole) == records(parts)
    assert all("accuracy" in record for record in records(parts) if "grad_norm" in record)


def test_weights_move_and_runs_with_another_seed_differ(sounds: Path, straight: Path, tmp_path: Path) -> None:
    other = go(run_options(sounds, "seed=1"), tmp_path)
    for x, y in zip(weights(straight).values(), weights(other).values(), strict=True):
        assert x != y
    first, last = (checkpoint.load(folder) for folder in (checkpoints(straight)[0], checkpoints(straight)[-1]))
    assert all(not first.model[name].equal(last.model[name]) for name in first.model if "norm" in name)
    assert last.ema and not last.ema["encoder.norm.weight"].equal(last.model["encoder.norm.weight"])


def test_an_added_phase_runs_alone(sounds: Path, straight: Path, tmp_path: Path) -> None:
    whole = run_options(sounds)
    two = whole.model_copy(update={"phases": whole.phases[:2]})
    go(two, tmp_path)
    before = weights(tmp_path)
    go(whole, tmp_path)
    assert weights(straight) == weights(tmp_path)
    assert {name: content for name, content in weights(straight).items() if "fine" not in name} == before
    assert training_steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_phase_added_under_way_may_not_move_the_grid(sounds: Path, tmp_path: Path) -> None:
    phases = "phases=[{name: only, steps: 4, batch_size: 8}"
    one_step(run_options(sounds, phases + "]"), tmp_path)
    with pytest.raises(UserError, match="phase only was begun on another grid"):
        go(run_options(sounds, phases + ", {name: more, steps: 2, batch_size: 8, time_factor: 16}]"), tmp_path)


def test_options_that_would_change_the_result_are_refused(sounds: Path, tmp_path: Path) -> None:
    one_step(run_options(sounds), tmp_path)
    keys = ("phases.1.lr=1e-3", "mask.ratio=0.5", "seed=3", "ema=0.5", "data.val_folds=[4]", "compression=patch")
    for override in keys:
        key = re.escape(override.partition("=")[0])
        with pytest.raises(UserError, match=rf"with other options: {key}\S* was .*, now [^\n]*$"):
            go(run_options(sounds, override), tmp_path)
    with pytest.raises(UserError, match=r"phases\.2"):
        go((o := run_options(sounds)).model_copy(update={"phases": o.phases[:2]}), tmp_path)


def test_options_of_how_it_runs_may_change(sounds: Path, straight: Path, tmp_path: Path) -> None:
    one_step(run_options(sounds), tmp_path)
    new = run_options(
        sounds, "train.log_every=3", "tracking.tags=[x]", "train.keep=1", "train.checkpoint_every=1", "data.workers=2"
    )
    go(new, tmp_path)
    assert weights(straight) == weights(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == options.dump(new)
    assert training_steps(tmp_path) == [1, 2, 3, 4, 6]  # the ends of phases always


def test_other_recordings_are_refused(sounds: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(sounds, tmp_path / "moved")
    one_step(run_options(sounds), tmp_path / "run")
    go(run_options(moved), tmp_path / "run")
    (moved / "am_fast" / "1-0000-A.wav").unlink()
    with pytest.raises(UserError, match=r"the recordings changed since .* \(60 clips then, 59 now\)"):
        go(run_options(moved), tmp_path / "run")


# --- one writer, who says when it stops


def test_a_second_writer_is_refused_and_a_dead_one_noticed(
    sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(tmp_path).lock(), pytest.raises(UserError, match=f"being written by process {os.getpid()} on"):
        go(run_options(sounds), tmp_path)
    (tmp_path / "lock").write_text(json.dumps({"pid": 4242, "host": "there", "started": "before"}))
    one_step(run_options(sounds), tmp_path)
    assert "process 4242 on there ended without letting go" in capsys.readouterr().out


def test_an_interrupted_run_says_where_it_stands(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGINT at step 1, which is saved; the same command goes on"):
        go(run_options(sounds), tmp_path, Stop(signal.SIGINT))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000001"]


# --- rehearsal


def test_rehearsal_changes_nothing(sounds: Path, straight: Path, tmp_path: Path) -> None:
    o = run_options(sounds)
    job = open_job(o, tmp_path / "job")
    before = [torch.get_rng_state(), np.random.get_state()[1], random.getstate(), job.curriculum.counters(5)]  # type: ignore[index]
    rehearse(job, job.curriculum.phases)
    after = [torch.get_rng_state(), np.random.get_state()[1], random.getstate(), job.curriculum.counters(5)]  # type: ignore[index]
    assert all(np.array_equal(x, y) for x, y in zip(before[:2], after[:2], strict=True)) and before[2:] == after[2:]  # type: ignore[arg-type]
    assert not list((tmp_path / "job").glob("phases/*"))
    run = go(run_options(sounds, "train.rehearse=true"), tmp_path / "run")
    assert weights(straight) == weights(run) and records(straight) == records(run)


def test_rehearsal_goes_through_every_phase_at_its_real_size(sounds: Path, tmp_path: Path) -> None:
    job = open_job(run_options(sounds, "phases.1.batch_size=6"), tmp_path)
    with watch(ViT) as seen:
        rehearse(job, job.curriculum.phases)
    # two steps of two micro-batches each; 10, 20, 40 tokens less three quarters, and the class token
    assert [tuple(shape[:2]) for _, shape in seen] == [(4, 1 + 2)] * 4 + [(3, 1 + 5)] * 4 + [(4, 1 + 10)] * 4


def test_a_phase_that_cannot_work_fails_before_the_first_step(sounds: Path, tmp_path: Path) -> None:
    huge = ["phases.2.batch_size=100000000000", "train.max_batch_per_device=null", "train.rehearse=true"]
    with pytest.raises(UserError, match="phase fine does not fit into memory with 100000000000 clips"):
        go(run_options(sounds, *huge), tmp_path)
    assert not list(tmp_path.glob("phases/*")) and not (tmp_path / "metrics.jsonl").exists()


# --- runs that diverge


@pytest.mark.parametrize("value", [float("nan"), 1e12])
def test_an_unsound_step_is_skipped_and_counted(sounds: Path, tmp_path: Path, value: float) -> None:
    """One batch gives a loss that is not finite, or has exploded."""
    o = run_options(sounds, "phases=[{name: only, steps: 7, batch_size: 7}]", "augment.mixup_prob=0",
                    "train.max_batch_per_device=7", "train.checkpoint_every=1", "train.keep=9")
    seen = 0

    def spoil(module: nn.Module, batch: Batch) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            batch.spec[:] = value * torch.randn_like(batch.spec)

    with before(MAE, spoil):
        run = go(o, tmp_path / "run")
    assert [record["skipped"] for record in records(run)] == [0, 0, 1, 1, 1, 1, 1]
    steps = [int(folder.name[5:]) for folder in run.glob("phases/*/checkpoints/step-*")]
    assert sorted(steps) == [1, 2, 4, 5, 6, 7]  # none of the moment when it might have been diverging
    assert all_finite(checkpoints(run)[-1])


@pytest.mark.parametrize("lr", [1e30, 1e9])
def test_a_run_that_diverges_stops_and_goes_on_with_a_lower_rate(sounds: Path, tmp_path: Path, lr: float) -> None:
    def options(lr: float) -> RunOptions:
        return run_options(sounds, f"phases.1.lr={lr}", "phases.1.steps=9", "train.max_nonfinite=2",
                           "train.checkpoint_every=1")

    def stops() -> Path:
        with pytest.raises(UserError, match=r"3 steps had a loss .* goes on from (.*step-0000000.)$") as stopped:
            go(options(lr), tmp_path)
        return Path(str(stopped.value).split(" from ")[-1])

    good = stops()
    assert all_finite(good) and good == max(tmp_path.glob("phases/*/checkpoints/step-*"), key=lambda path: path.name)
    assert sorted(path.name for path in tmp_path.glob("phases/1-middle/checkpoints/*")) == ["diverged-step-00000003"]
    assert stops() == good
    with pytest.raises(UserError, match=r"other options: seed was 0, now 1"):
        go(options(lr).model_copy(update={"seed": 1}), tmp_path)
    run = go(options(1e-3), tmp_path)
    assert training_steps(run) == [*range(1, 14)] and all_finite(checkpoints(run)[-1])


def all_finite(folder: Path) -> bool:
    saved = checkpoint.load(folder)
    return all(bool(value.isfinite().all()) for value in [*saved.model.values(), *(saved.ema or {}).values()])


# --- validation


@pytest.mark.parametrize("compression", ["frame_shift", "patch"])
def test_validation_is_at_full_resolution_and_changes_nothing(compression: str, sounds: Path, tmp_path: Path) -> None:
    off = run_options(sounds, f"compression={compression}", "evaluation.mask_ratio=0.5")
    on = off.model_copy(update={"evaluation": off.evaluation.model_copy(update={"every": 0.01})})
    with watch(ViT) as seen:
        go(on, tmp_path / "on")
    tokens = [shape[1] for training, shape in seen if not training]
    half, whole = 1 + 20, 1 + 40  # of the fine tokens, for the loss, and for the rank of features and the probe
    assert [n for n in tokens if n in (half, whole)] == [half, whole, whole] * 6
    assert len(tokens) == 3 * 6 + 3  # the rest are the pictures at the end of each phase
    assert len({shape[1] for training, shape in seen if training}) == 3
    assert weights(tmp_path / "on") == weights(go(off, tmp_path / "off"))
    scores = [record for record in records(tmp_path / "on") if "val/loss" in record]
    assert [record["step"] for record in scores] == [1, 2, 3, 4, 5, 6]
    assert all(record["val/loss"] > 0 and 0 <= record["val/knn_accuracy"] <= 1 for record in scores)


def test_validation_repeats_and_leaves_the_generators_alone(sounds: Path, tmp_path: Path) -> None:
    o = run_options(sounds)
    job = open_job(o, tmp_path)
    weights_before = snapshot(job, prepare(job, job.curriculum.phases[0]))
    before, device = torch.get_rng_state(), torch.device("cpu")
    results = []
    for _ in range(2):
        fine = weights_before.at_full_resolution(device)
        results.append(validate(fine, o, job.runner(o.fine_geometry)))
    assert results[0] == results[1] and torch.get_rng_state().equal(before)


# --- what is written about it


def test_axes_depend_on_the_step_alone(sounds: Path, tmp_path: Path) -> None:
    o = run_options(sounds, "phases.0.batch_size=6", "evaluation.every=0.3")
    job = open_job(o, tmp_path)
    go(o, tmp_path)
    for record in records(tmp_path):
        assert {key: record[key] for key in ("samples", "tokens", "flops")} == job.curriculum.counters(record["step"])
    last, plan = records(tmp_path)[-1], json.loads((tmp_path / "plan.json").read_text())
    assert last["samples"] == 2 * (6 + 8 + 8)
    assert last["tokens"] == sum(phase["clips"] * phase["kept"] for phase in plan["phases"])
    assert last["flops"] == pytest.approx(plan["pflops"] * 1e15, rel=1e-12)
    assert json.loads((tmp_path / "phases/2-fine/done").read_text())["flops"] == last["flops"]


def test_times_are_sensible(sounds: Path, tmp_path: Path) -> None:
    o = run_options(sounds, "data.cache_gb=0", "train.log_every=2", "phases.0.steps=5")
    lines = [json.loads(line) for line in (go(o, tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["data_wait"] < 1 for line in lines)
    seconds = [0.0, *(line["train_seconds"] for line in lines)]
    samples = [0, *(line["samples"] for line in lines)]
    for i, line in enumerate(lines):  # over all the steps since the line before
        rate = (samples[i + 1] - samples[i]) / (seconds[i + 1] - seconds[i])
        assert line["clips_per_second"] == pytest.approx(rate, rel=1e-6)


# --- bad recordings


def spoil(file: Path) -> None:
    """NaN samples behind a good header of the same length."""
    soundfile.write(file, np.full(soundfile.info(file).frames, np.nan), 16000, subtype="FLOAT")


@pytest.mark.parametrize(("workers", "every"), [(0, 9), (2, 0)])
def test_bad_files_are_skipped_counted_and_named(workers: int, every: int, sounds: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sounds, tmp_path / "sounds")
    (root / "am_fast" / "1-0000-A.wav").write_text("this is text")
    for name in ("am_slow", "fm_slow"):
        spoil(root / name / "1-0000-A.wav")
    spoil(root / "fm_fast" / "5-0004-A.wav")  # held out: validation finds it
    an_epoch = [
        f"data.workers={workers}", "data.cache_gb=0", "phases=[{name: only, steps: 7, batch_size: 7}]",
        f"evaluation.every={every}", "evaluation.max_clips=99",
    ]
    run = go(run_options(root, *an_epoch), tmp_path / "run")
    bad = [json.loads(line) for line in (run / "bad_files.jsonl").read_text().splitlines()]
    named = sorted(row["path"] for row in bad)
    in_training = ["am_fast/1-0000-A.wav", "am_slow/1-0000-A.wav", "fm_slow/1-0000-A.wav"]
    assert [path for path in named if not path.startswith("fm_fast")] == in_training
    assert "fm_fast/5-0004-A.wav" in named or not every
    assert all(row["reason"] for row in bad)
    with pytest.raises(UserError, match=r"^3 unreadable files, more than data.max_bad_files=2; the last is \S+: .*$"):
        go(run_options(root, *an_epoch, "data.max_bad_files=2"), tmp_path / "strict")


def test_the_error_of_a_worker_is_one_line(sounds: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sounds, tmp_path / "sounds")
    o = run_options(root, "data.workers=2", "data.cache_gb=0", "data.max_bad_files=1000")
    one_step(o, tmp_path / "run")
    for file in root.rglob("*.wav"):
        spoil(file)
    with pytest.raises(UserError, match=r"^100 clips in a row cannot be read, the last is \S+: [^\n]*$"):
        go(o, tmp_path / "run")
    assert not multiprocessing.active_children()  # the workers left with it


# --- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with mounted(tmp_path / "disk", "size=2m") as folder:
        yield folder


@pytest.mark.parametrize(
    ("room", "steps", "every", "file"),
    [
        (40_000, 2, 1, "step-0"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            (0, 2, 1, "config.yaml"), (5_000, 32, 99, "metrics.jsonl"), (130_000, 3, 1, "step-0"),
        )),
    ],
)
def test_a_full_disk_costs_nothing_but_time(
    room: int, steps: int, every: int, file: str, sounds: Path, tmp_path: Path, small_disk: Path
) -> None:
    o = run_options(sounds, f"train.checkpoint_every={every}", f"phases.0.steps={steps}")
    run = small_disk / "run"
    one_step(o, run)
    filler, free = small_disk / "filler", shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * max(free - room, 0))
    with pytest.raises(UserError, match=f"^cannot write [^\n]*{file}[^\n]*No space left on device[^\n]*$"):
        go(o, run)
    assert checkpoint.load(checkpoints(run)[0]).state["step"] >= 1
    assert not list(run.rglob(".tmp-*"))
    filler.unlink()
    go(o, run)
    whole = go(o, tmp_path / "whole")
    assert weights(whole) == weights(run) and records(whole) == records(run)


def test_a_read_only_folder_is_one_line(sounds: Path, small_disk: Path) -> None:
    one_step(run_options(sounds), small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in ("run", "other"):
        with pytest.raises(UserError, match=r"^cannot write [^\n]*Read-only file system$"):
            go(run_options(sounds), small_disk / folder)
