"""Any checkpoint, however damaged, works or is refused in one line, and none gives NaN as a result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from fuzz import audio, checkpoints, harness
from fuzz.harness import Case, Outcome

from ssl_c2f.train.weights import find_checkpoint

COUNT, FAST = 300, 15


def cases(folder: Path, classifier: Path, tones: Path, count: int) -> Iterator[Case]:
    found = find_checkpoint(classifier)
    for case in checkpoints.folders({file.name: file.read_bytes() for file in found.iterdir()}, count):
        place = folder / case.name.partition("-")[0]
        (place / "step-00000004").mkdir(parents=True)
        for name, data in case.files.items():
            (place / "step-00000004" / name).write_bytes(data)
        (place / "a.wav").write_bytes(audio.sound("pcm16"))
        ckpt = ("--ckpt", "step-00000004")
        yield Case(case.name, place, (
            ("predict", *ckpt, "a.wav", "out=p.json"),
            ("embed", *ckpt, f"data.root={tones}", "folds=[1]", "out=f.npz"),
            ("evaluate", *ckpt, f"data.root={tones}", "folds=[1]", "out=scores"),
            ("export", "step-00000004", "--format", "safetensors", "--out", "exported"),
        ))


def wrong(case: Case, outcomes: list[Outcome]) -> Iterator[str]:
    predict, embed, evaluate, export = outcomes

    for outcome, made in zip(outcomes, ("p.json", "f.npz", "scores/scores.json", "exported/encoder.json"), strict=True):
        if (outcome.status == 0) != (case.folder / made).exists():
            yield f"{outcome.words[0]}: exit status {outcome.status} does not go with {made}"
    if predict.status == 0:
        json.loads((case.folder / "p.json").read_text(), parse_constant=harness.refuse)
    if embed.status == 0 and not np.isfinite(np.load(case.folder / "f.npz")["features"]).all():
        yield "embed: not finite"
    if evaluate.status == 0:
        json.loads((case.folder / "scores" / "scores.json").read_text(), parse_constant=harness.refuse)
    if export.status == 0:
        tensors = safetensors.numpy.load_file(case.folder / "exported" / "encoder.safetensors")
        if not all(np.isfinite(t).all() for t in tensors.values()):
            yield "export: not finite"
        json.loads((case.folder / "exported" / "encoder.json").read_text(), parse_constant=harness.refuse)
    if leftovers := [file for file in os.listdir(case.folder) if file.endswith(".tmp")]:
        yield f"left {leftovers}"


def check(folder: Path, classifier: Path, tones: Path, count: int) -> None:
    found = harness.faults(harness.run(cases(folder, classifier, tones, count)), wrong)
    assert not found, f"{len(found)} faults in {count} checkpoints:\n" + "\n".join(found)


def test_some_checkpoints(tmp_path: Path, classifier: Path, tones: Path) -> None:
    check(tmp_path, classifier, tones, FAST)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of a busy machine
def test_three_hundred_checkpoints(tmp_path: Path, classifier: Path, tones: Path) -> None:
    check(tmp_path, classifier, tones, COUNT)
