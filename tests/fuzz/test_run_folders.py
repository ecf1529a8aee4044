"""No run folder, however damaged, stops a command other than by one line; what goes on ends as it should."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from engine_runs import go, one_step
from fuzz import harness, run_folders
from fuzz.harness import Case, Outcome
from tiny_runs import weights

from ssl_c2f import cli
from ssl_c2f.core import options
from ssl_c2f.tasks.config import PretrainOptions

COUNT, FAST = 300, 8


class Bases(NamedTuple):
    """A run that was stopped in its second phase, and that it is when it has gone on to its end."""

    config: Path
    stopped: Path
    complete: Path
    weights: dict[str, bytes]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tones: Path) -> Bases:
    folder = tmp_path_factory.mktemp("bases")
    o = options.load(PretrainOptions, None, (), {
        "data": {"root": str(tones), "val_folds": [5]},
        "audio": {"sample_rate": 8000, "clip_seconds": 0.5, "num_mels": 32},
        "model": {"width": 16, "depth": 1, "heads": 2, "patch_f": 16, "patch_t": 8},
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1}, "ema": 0.9,
        "phases": [{"name": "coarse", "steps": 2, "batch_size": 4, "time_factor": 2},
                   {"name": "fine", "steps": 4, "batch_size": 4}],
        "train": {"rehearse": False, "device": "cpu", "log_every": 1, "checkpoint_every": 1},
        "tracking": {"wandb": "off"},
        "evaluation": {"mask_draws": 1, "max_clips": 4},
    })
    config, stopped, complete = folder / "tiny.yaml", folder / "stopped", folder / "complete"
    config.write_text(options.dump(o))
    for _ in range(4):
        one_step(o, stopped)
    shutil.copytree(stopped, complete)
    go(o, complete)
    tuned = (f"data.root={tones}", "train.rehearse=false", "phases.0.epochs=1", "folds=[5]", "tracking.wandb=off")
    assert not cli.main(["finetune", "--ckpt", str(complete), *tuned])
    assert not cli.main(["probe", "--ckpt", str(complete), f"data.root={tones}"])
    return Bases(config, stopped, complete, weights(complete))


def cases(folder: Path, bases: Bases, tones: Path, count: int) -> Iterator[Case]:
    for number in range(count):
        place = folder / f"{number:03}"
        shutil.copytree((bases.stopped, bases.complete)[number % 2], place / "run")
        elsewhere = folder / f"{number:03}.elsewhere"
        elsewhere.write_text(run_folders.SECRET)
        what = run_folders.damage(place / "run", number, elsewhere)
        yield Case(f"{number:03} {'complete' if number % 2 else 'stopped'}, {what}", place, (
            ("report", "run", "--out", "page.html"),
            ("embed", "--ckpt", "run", f"data.root={tones}", "folds=[1]", "out=f.npz"),
            ("pretrain", str(bases.config), "run_dir=run"),
        ))


def wrong(case: Case, outcomes: list[Outcome], good: dict[str, bytes]) -> Iterator[str]:
    report, embed, pretrain = outcomes
    if report.status != 0:
        yield f"report: {report.err}"
    if (case.folder / "page.html").exists() and run_folders.SECRET in (case.folder / "page.html").read_text():
        yield "report: shows somebody else's file"
    elsewhere = case.folder.with_name(f"{case.folder.name}.elsewhere")
    if elsewhere.read_text() != run_folders.SECRET:
        yield "somebody else's file was changed"
    if embed.status == 0 and not np.isfinite(np.load(case.folder / "f.npz")["features"]).all():
        yield "embed: not finite"
    if pretrain.status == 0:
        newest = [name for name in good if name.startswith("phases/1-fine/")]
        files = {name: case.folder / "run" / name for name in newest}
        made = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
        if differ := [name for name in newest if made.get(name) != good[name]]:
            yield f"pretrain: exit status 0, and other content of {differ[0]}: {pretrain.err[-300:]}"
    for parent, _, files in os.walk(case.folder):
        if left := [name for name in files if name.endswith(".tmp")]:
            yield f"left {parent}/{left[0]}"


def check(folder: Path, bases: Bases, tones: Path, count: int) -> None:
    found = harness.faults(harness.run(cases(folder, bases, tones, count)), lambda c, o: wrong(c, o, bases.weights))
    assert not found, f"{len(found)} faults in {count} run folders:\n" + "\n".join(found)


def test_some_run_folders(tmp_path: Path, bases: Bases, tones: Path) -> None:
    check(tmp_path, bases, tones, FAST)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of a busy machine
def test_three_hundred_run_folders(tmp_path: Path, bases: Bases, tones: Path) -> None:
    check(tmp_path, bases, tones, COUNT)
