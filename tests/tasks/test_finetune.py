"""Which weights fine-tuning starts from, and which recordings each fold trains on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import before
from launcher import CONFIG, launch
from torch import Tensor

from ssl_c2f.core import options
from ssl_c2f.core.options import UserError
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.manifest import scan
from ssl_c2f.data.runner import Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives.supervised import Supervised
from ssl_c2f.tasks.finetune import FinetuneOptions, checkpoint_defaults, finetune
from ssl_c2f.tasks.probe import ProbeOptions, choose_strength, linear_scores, standardise
from ssl_c2f.train.weights import load_weights


def tuning(ckpt: Path, root: Path, run: Path, **more: Any) -> FinetuneOptions:
    """Two steps per fold; 12 of the 15 recordings are an epoch, so any that leaks would be seen."""
    return options.load(FinetuneOptions, None, (), dict(checkpoint_defaults(load_weights(ckpt))) | {
        "data": {"root": str(root)}, "phases": [{"name": "tune", "steps": 2, "batch_size": 12}], "run_dir": str(run),
        "train": {"rehearse": False, "device": "cpu"}, "tracking": {"wandb": "off"}, **more,
    })


def tune(ckpt: Path, o: FinetuneOptions) -> tuple[list[set[int]], dict[str, bool]]:
    """The clips of each step, and for each tensor of the encoder whether training began with the checkpoint's."""
    seen: list[set[int]] = []
    first: dict[str, Tensor] = {}

    def look(model: Supervised, batch: Batch) -> None:
        seen.append(set(batch.index.tolist()))
        for name, value in model.state_dict().items():
            first.setdefault(name, value.clone())

    with before(Supervised, look):
        finetune(ckpt, o)
    pretrained = load_weights(ckpt).tensors
    return seen, {name: first[name].equal(pretrained[name]) for name in first if name.startswith("encoder.")}


def test_a_fold_learns_from_the_others_and_is_scored_on_its_own(
    autoencoder: Path, tones: Path, tmp_path: Path
) -> None:
    clips = scan(tones).clips
    seen, carried = tune(autoencoder, tuning(autoencoder, tones, tmp_path, folds=[2, 4]))
    for fold, learned in ((2, seen[0] | seen[1]), (4, seen[2] | seen[3])):
        others = {i for i, clip in enumerate(clips) if clip.fold != fold}
        assert learned == others and len(others) == 12
        facts = json.loads((tmp_path / f"fold-{fold}/recordings.json").read_text())
        assert (facts["training"], facts["held_out"]) == (12, 3)
        told = json.loads((tmp_path / f"fold-{fold}/phases/0-tune/transfer.json").read_text())
        assert str(autoencoder) in told["from"]
    with (tmp_path / "predictions.csv").open(newline="") as lines:
        scored = sorted(row["path"] for row in csv.DictReader(lines))
    assert scored == sorted(clip.path for clip in clips if clip.fold in (2, 4))
    assert len(carried) > 10 and all(carried.values())


@pytest.mark.parametrize("head", ["bands", "mean_pool"])
def test_a_head_may_start_as_the_linear_probe(head: str, autoencoder: Path, tones: Path, tmp_path: Path) -> None:
    """It then says of the recordings held out what a regression on the same features of the others says."""
    o = tuning(
        autoencoder, tones, tmp_path, folds=[2], start="probe", optim={"lr": 1e-12},
        objective={"name": "supervised", "head": head},
    )
    finetune(autoencoder, o)
    tuned = load_weights(tmp_path / "fold-2")
    model = tuned.objective(o.fine_geometry)
    assert isinstance(model, Supervised)
    corpus = Corpus.open(o.data.model_copy(update={"val_folds": (2,)}), 0, None)
    runner = Runner(corpus, InputStatistics(corpus, tuned.statistics).front_end(o.fine_geometry), 4)
    x, found = runner.run(model.head_features, corpus.training).by_clip()
    labels = corpus.manifest.labels(found)
    folds = torch.tensor([corpus.manifest.clips[i].fold or 0 for i in found.tolist()])
    strength, _ = choose_strength(x, labels, folds, ProbeOptions(), True)
    queries, _ = runner.run(model.head_features, corpus.held_out).by_clip()
    a, b = standardise(x, queries)
    expected = linear_scores(a, labels, b, [strength], True)[0]
    scores, _ = runner.run(model.scores, corpus.held_out).by_clip()
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-3)
    assert scores.std(0).max() > 1e-3


def test_from_scratch_is_without_the_checkpoints_weights(autoencoder: Path, tones: Path, tmp_path: Path) -> None:
    _, carried = tune(autoencoder, tuning(autoencoder, tones, tmp_path, folds=[1], from_scratch=True))
    assert len(carried) > 10 and not any(carried.values())
    assert not list(tmp_path.rglob("transfer.json"))
    assert json.loads((tmp_path / "scores.json").read_text())["from_scratch"]


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
    done = tmp_path / "run/finetune/default/fold-1/phases/0-finetune/done"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    assert launch("pipeline", *words) == 2
    assert "finetune/default was fine-tuned before phase coarse was there: choose" in capsys.readouterr().err
    assert launch("pipeline", *words, "finetune.name=again") == 0
