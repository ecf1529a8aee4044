"""Run folders, checkpoints and queued jobs of an earlier version keep working.

`earlier/run` was made by commit 395f74d, with `earlier/config.yaml` on the sounds of `write_dataset(folder,
clips_per_class=5, seconds=0.5, sample_rate=8000)`; `earlier/fold-1` was fine-tuned from it.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import checkpoints

import ssl_c2f
from ssl_c2f import cli
from ssl_c2f.core import checkpoint
from ssl_c2f.data.synthetic import write_dataset
from ssl_c2f.launch.jobs import Job

EARLIER = Path(__file__).parent / "earlier"


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The recordings, at the path where the earlier version found them."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "sounds", clips_per_class=5, seconds=0.5, sample_rate=8000)
    return "data.root=sounds"


def test_a_run_resumes(sounds: str, tmp_path: Path) -> None:
    run = shutil.copytree(EARLIER / "run", tmp_path / "run")
    shutil.rmtree(run / "phases/1-fine")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    assert cli.main(["pretrain", str(EARLIER / "config.yaml"), sounds, f"run_dir={run}"]) == 0
    now, then = (checkpoint.load(checkpoints(folder)[-1]) for folder in (run, EARLIER / "run"))
    assert now.model.keys() == then.model.keys() and now.ema and then.ema
    for name, tensor in then.model.items():  # rounding differs between machines
        torch.testing.assert_close(now.model[name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(now.ema[name], then.ema[name], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_alone(sounds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(EARLIER / "run", tmp_path / "run")
    before = {file: file.read_bytes() for file in run.glob("phases/*/checkpoints/*/*")}
    assert cli.main(["pretrain", str(EARLIER / "config.yaml"), sounds, f"run_dir={run}"]) == 0
    assert {file: file.read_bytes() for file in run.glob("phases/*/checkpoints/*/*")} == before
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0


def test_its_checkpoints_are_used(sounds: str, tmp_path: Path) -> None:
    run = shutil.copytree(EARLIER / "run", tmp_path / "run")
    assert cli.main(["embed", "--ckpt", str(run), sounds, "out=features.npz"]) == 0
    assert np.load("features.npz")["features"].shape == (60, 8)
    assert cli.main(["finetune", "--ckpt", str(run), sounds, "folds=[2]", "phases.0.epochs=1"]) == 0
    fold = shutil.copytree(EARLIER / "fold-1", tmp_path / "fold-1")
    assert cli.main(["evaluate", "--ckpt", str(fold), sounds, "folds=[1]"]) == 0
    model = ssl_c2f.create_model(str(EARLIER / "fold-1"))
    assert model(torch.zeros(1, 4000)).shape == (1, 12)


def test_a_job_that_waits_in_the_queue_finds_its_class() -> None:
    now = pickle.dumps(Job("pretrain", "coarse", "config.yaml", "run"), protocol=2)  # in it, names end with their line
    queued = now.replace(b"ssl_c2f.launch.jobs", b"ssl_c2f.jobs")
    assert queued != now
    assert pickle.loads(queued) == Job("pretrain", "coarse", "config.yaml", "run")
