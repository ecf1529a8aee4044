"""The whole story on sounds that are made here: pretrain from coarse to fine, probe, fine-tune, look at it.

FOLDER/
  sounds/unlabelled  sounds/labelled   what is learned from, and what it is tested with: no clip is in both
  finetune/pretrained  finetune/scratch   probe/labelled   report.html   and the run itself, as in run.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_c2f.core.files import write_text
from ssl_c2f.core.options import UserError
from ssl_c2f.core.progress import table
from ssl_c2f.curriculum.geometry import AudioOptions
from ssl_c2f.curriculum.phases import PhaseOptions
from ssl_c2f.data.augment import AugmentOptions
from ssl_c2f.data.recordings import DataOptions
from ssl_c2f.data.synthetic import CLASSES, write_dataset
from ssl_c2f.models.vit import ViTOptions
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.report import write_page
from ssl_c2f.tasks.finetune import FinetuneOptions, finetune
from ssl_c2f.tasks.probe import ProbeOptions, print_probe, probe
from ssl_c2f.track.wandb_run import TrackingOptions
from ssl_c2f.train import engine
from ssl_c2f.train.optim import OptimOptions
from ssl_c2f.train.recipe import EvaluationOptions, LoopOptions, RunOptions

SECONDS = 2.0  # of a clip
UNLABELLED, LABELLED = 50, 25  # clips of each class
EPOCHS = (30.0, 12.0, 8.0)  # coarse, middle, fine
TUNING_EPOCHS = 12.0  # coarse, and a third of it fine
TEST_FOLD = 1

AUDIO = AudioOptions(clip_seconds=SECONDS, num_mels=64)
MODEL = ViTOptions(width=96, depth=4, heads=4, patch_f=8, patch_t=8)


def demo(
    folder: Path = Path("runs/demo"), epochs: Sequence[float] = EPOCHS, tuning_epochs: float = TUNING_EPOCHS
) -> Path:
    """Run the demo in `folder`, or go on with it, and return the page that shows it.

    Raises:
        UserError: the folder cannot be written, or holds another run.
    """
    began = time.monotonic()
    _make_sounds(folder / "sounds")
    _say(f"Pretraining in three phases, without labels, on {UNLABELLED * len(CLASSES)} sounds")
    engine.run(pretrain_options(folder, epochs), folder)
    _say("How much a linear classifier and nearest neighbours make of frozen features of other sounds")
    probes = _probe(folder)
    _say(f"Fine-tuning with labels, and the same network from random weights; tested on fold {TEST_FOLD}")
    tuned = {}
    for name in ("pretrained", "scratch"):
        tuned[name] = _scores(finetune(folder, finetune_options(folder, name, tuning_epochs)))
    page = write_page([folder], folder / "report.html")
    _say("What came out")
    _summary(folder, probes, tuned)
    print(f"{time.monotonic() - began:.0f} s. Look at it: {page.resolve().as_uri()}")
    print("Next, with sounds of your own: ssl_c2f pretrain data.root=FOLDER run_dir=runs/mine")
    return page


def pretrain_options(folder: Path, epochs: Sequence[float] = EPOCHS) -> RunOptions:
    """Frame shift 40, 20, then 10 ms."""
    names, factors = ("coarse", "middle", "fine"), (4, 2, 1)
    return RunOptions(
        data=DataOptions(root=str(folder / "sounds" / "unlabelled"), val_folds=(5,)),
        audio=AUDIO, model=MODEL, objective=MAEOptions(decoder_width=48, decoder_depth=1), optim=OptimOptions(lr=2e-3),
        phases=tuple(
            PhaseOptions(name=n, epochs=e, time_factor=c, batch_size=32, warmup_epochs=min(1.0, e / 4), mask_ratio=0.7)
            for n, e, c in zip(names, epochs, factors, strict=True)
        ),
        evaluation=EvaluationOptions(every=10.0, mask_draws=2, batch_size=60), train=LoopOptions(log_every=5),
        tracking=TrackingOptions(wandb="off"),
    )


def finetune_options(folder: Path, name: str, epochs: float = TUNING_EPOCHS) -> FinetuneOptions:
    """The same recipe with the pretrained encoder and, named "scratch", with random weights."""
    return FinetuneOptions(
        name=name, run_dir=str(folder / "finetune" / name), from_scratch=name == "scratch", folds=(TEST_FOLD,),
        data=DataOptions(root=str(folder / "sounds" / "labelled")), audio=AUDIO, model=MODEL,
        augment=AugmentOptions(freq_mask=8, time_mask_seconds=0.2),
        optim=OptimOptions(lr=1e-3, layer_decay=0.75, betas=(0.9, 0.999)),
        phases=(
            PhaseOptions(name="coarse", epochs=epochs, time_factor=2, batch_size=32, warmup_epochs=epochs / 6),
            PhaseOptions(name="fine", epochs=epochs / 3, time_factor=1, batch_size=32, lr=5e-4),
        ),
        evaluation=EvaluationOptions(batch_size=60), train=LoopOptions(log_every=5),
        tracking=TrackingOptions(wandb="off"),
    )


def _make_sounds(folder: Path) -> None:
    """Written once; the last thing is a file that says so."""
    done = folder / "made"
    if done.exists():
        return
    _say(f"Making sounds of {len(CLASSES)} kinds in {folder}")
    try:
        write_dataset(folder / "unlabelled", clips_per_class=UNLABELLED, seconds=SECONDS, seed=0)
        write_dataset(folder / "labelled", clips_per_class=LABELLED, seconds=SECONDS, seed=1)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    write_text(done, "")


def _probe(folder: Path) -> Mapping[str, Any]:
    out = folder / "probe" / "labelled"
    if (out / "probe.json").exists():
        result: Mapping[str, Any] = json.loads((out / "probe.json").read_text())
        print_probe(result)
        return result
    return probe(
        folder, ProbeOptions(data=DataOptions(root=str(folder / "sounds" / "labelled")), out=str(out), batch_size=60)
    )


def _scores(folder: Path) -> Mapping[str, Any]:
    result: Mapping[str, Any] = json.loads((folder / "scores.json").read_text())
    return result


def _summary(folder: Path, probes: Mapping[str, Any], tuned: Mapping[str, Mapping[str, Any]]) -> None:
    """One table of everything that was compared."""
    rows = [
        (f"linear probe, {row['readout']}", row["features"], f"{score['mean']:.1%}", f"± {score['std']:.1%} over folds")
        for row in probes["rows"] if (score := row["linear"])
    ]
    rows += [
        ("fine-tuned", name, f"{s['accuracy']:.1%}", f"{s['interval'][0]:.1%} to {s['interval'][1]:.1%} (95 %)")
        for name, s in tuned.items()
    ]
    chance = f"{1 / len(CLASSES):.1%}"
    table(f"Accuracy on {len(CLASSES)} classes (chance {chance})", ("how", "weights", "accuracy", "uncertainty"), rows)


def _say(line: str) -> None:
    print(f"\n{line}", flush=True)
