"""Which weights fine-tuning begins with, and which recordings each fold learns from."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import CONFIG, launch
from test_step import before
from torch import Tensor

from ssl_c2f import options
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.manifest import scan
from ssl_c2f.finetune import FinetuneOptions, checkpoint_defaults, finetune
from ssl_c2f.objectives.supervised import Supervised
from ssl_c2f.options import UserError
from ssl_c2f.weights import load_weights


def tuning(ckpt: Path, root: Path, run: Path, **more: Any) -> FinetuneOptions:
    """Two steps per fold; 12 of the 15 recordings are an epoch, so any that leaks would be seen."""
    return options.load(FinetuneOptions, None, (), dict(checkpoint_defaults(load_weights(ckpt))) | {
        "data": {"root": str(root)}, "phases": [{"name": "tune", "steps": 2, "batch_size": 12}], "run_dir": str(run),
        "train": {"rehearse": False, "device": "cpu"}, "tracking": {"wandb": "off"}, **more,
    })


def test_a_fold_learns_from_the_others_and_is_scored_on_its_own(
    autoencoder: Path, tones: Path, tmp_path: Path
) -> None:
    clips = scan(tones).clips
    seen: list[set[int]] = []
    with before(Supervised, lambda model, batch: seen.append(set(batch.index.tolist()))):
        finetune(autoencoder, tuning(autoencoder, tones, tmp_path, folds=[2, 4]))
    for fold, learned in ((2, seen[0] | seen[1]), (4, seen[2] | seen[3])):
        others = {i for i, clip in enumerate(clips) if clip.fold != fold}
        assert learned == others and len(others) == 12
        facts = json.loads((tmp_path / f"fold-{fold}/recordings.json").read_text())
        assert (facts["training"], facts["held_out"]) == (12, 3)
    with (tmp_path / "predictions.csv").open(newline="") as lines:
        scored = sorted(row["path"] for row in csv.DictReader(lines))
    assert scored == sorted(clip.path for clip in clips if clip.fold in (2, 4))


@pytest.mark.parametrize("from_scratch", [False, True])
def test_from_scratch_is_without_the_checkpoints_weights(
    from_scratch: bool, autoencoder: Path, tones: Path, tmp_path: Path
) -> None:
    pretrained = {name: value for name, value in load_weights(autoencoder).state.items() if name.startswith("encoder.")}
    first: list[dict[str, Tensor]] = []

    def look(model: Supervised, batch: Batch) -> None:
        first.append({name: value.clone() for name, value in model.state_dict().items()})

    with before(Supervised, look):
        finetune(autoencoder, tuning(autoencoder, tones, tmp_path, folds=[1], from_scratch=from_scratch))
    told = tmp_path / "fold-1/phases/0-tune/transfer.json"
    assert json.loads((tmp_path / "scores.json").read_text())["from_scratch"] == from_scratch
    assert told.exists() != from_scratch
    for name, value in pretrained.items():
        assert torch.equal(first[0][name], value) != from_scratch, name
    if not from_scratch:
        assert str(autoencoder) in json.loads(told.read_text())["from"]


def test_folds_of_another_checkpoint_are_refused(
    autoencoder: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores over all folds would be told as those of one checkpoint."""
    run = shutil.copytree(autoencoder, tmp_path / "run")
    finetune(run, tuning(run, tones, tmp_path / "tuned", folds=[1]))
    run = run.rename(tmp_path / "moved")
    finetune(run, tuning(run, tones, tmp_path / "tuned", folds=[1, 2]))
    (old,) = run.glob("phases/0-only/checkpoints/step-*")
    shutil.copytree(old, old.with_name("step-00000009"))
    with pytest.raises(UserError, match=r"was fine-tuned from \S+/step-00000004, and this is \S+/step-00000009"):
        finetune(run, tuning(run, tones, tmp_path / "tuned", folds=[1, 2, 3]))
    words = ["--ckpt", run, f"data.root={tones}", "--run-dir", tmp_path / "tuned", "--dry-run"]
    assert launch("finetune", *words) == 2 and "was fine-tuned from" in capsys.readouterr().err
    assert not (tmp_path / "tuned/fold-3").exists()
    finetune(run, tuning(run, tones, tmp_path / "other", folds=[3]))


def test_a_pipeline_does_not_take_folds_of_before_its_last_phase(
    tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    words = [tmp_path / "config.yaml", f"data.root={tones}", "--run-dir", tmp_path / "run", "--dry-run"]
    assert launch("pipeline", *words) == 0
    done = tmp_path / "run/finetune/default/fold-1/phases/0-tune/done"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    assert launch("pipeline", *words) == 2
    assert "finetune/default was fine-tuned before phase coarse was there: choose" in capsys.readouterr().err
    assert launch("pipeline", *words, "finetune.name=again") == 0
