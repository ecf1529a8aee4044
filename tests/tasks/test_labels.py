"""Labels as people have them, from a folder or a table to the scores: counts are made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ssl_c2f.core import options
from ssl_c2f.core.options import UserError
from ssl_c2f.tasks.evaluate import EvaluateOptions, evaluate
from ssl_c2f.tasks.finetune import FinetuneOptions, checkpoint_defaults, finetune
from ssl_c2f.train.weights import load_weights


def tones_in(root: Path, counts: dict[str, int]) -> Path:
    """Recordings of a quarter of a second, so many in each folder."""
    for index, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            wave = 0.3 * np.sin(2 * np.pi * (300 + 400 * index + 20 * i) * np.arange(2000) / 8000)
            soundfile.write(root / name / f"{i:02}.wav", wave, 8000)
    return root


def tune(ckpt: Path, run: Path, data: dict[str, Any], *overrides: str) -> dict[str, Any] | None:
    """The scores, if there are any."""
    defaults = dict(checkpoint_defaults(load_weights(ckpt)))
    o = options.load(FinetuneOptions, None, overrides, defaults | {
        "data": defaults["data"] | data, "phases": [{"name": "tune", "steps": 2, "batch_size": 4}],
        "run_dir": str(run), "train": {"rehearse": False, "device": "cpu"}, "tracking": {"wandb": "off"},
    })
    finetune(ckpt, o)
    scores = run / "scores.json"
    return json.loads(scores.read_text()) if scores.exists() else None


def test_a_folder_without_folds_is_scored_on_a_fifth(
    autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tones_in(tmp_path / "sounds", {"cat": 10, "dog": 10, "owl": 5})
    result = tune(autoencoder, tmp_path / "run", {"root": str(root)})
    assert result is not None and [sum(row) for row in result["confusion"]] == [2, 2, 1]
    said = capsys.readouterr().out
    assert "the recordings have no folds: 5 of 25 clips are held out, class by class" in said
    everything = evaluate(tmp_path / "run", options.load(EvaluateOptions, None, [f"data.root={root}"]))
    assert everything["seen_in_training"] == 20  # the other five were held out

    assert tune(autoencoder, tmp_path / "all", {"root": str(root), "val_fraction": 0.0}) is None
    assert "there will be no score" in capsys.readouterr().out


def test_a_table_with_a_split_is_scored_on_its_test_clips(
    autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tones_in(tmp_path / "sounds", {"cat": 6, "dog": 6})
    rows = ["Recorder,File Name,Species,lat,lon,Subset"]
    for name in ("cat", "dog"):
        parts = ("train", "train", "train", "val", "test", "test")
        rows += [f"A,{name}/{i:02}.wav,{name},1,2,{part}" for i, part in enumerate(parts)]
    (tmp_path / "export.csv").write_text("\r\n".join(rows))
    data = {"manifest": str(tmp_path / "export.csv"), "root": str(root)}
    result = tune(autoencoder, tmp_path / "run", data, "evaluation.every=1")
    facts = json.loads((tmp_path / "run/recordings.json").read_text())
    assert result is not None and [sum(row) for row in result["confusion"]] == [2, 2]
    assert (facts["training"], facts["held_out"]) == (6, 2)  # validated on val, scored on test
    assert "columns that are not used: Recorder, lat, lon" in capsys.readouterr().out


def test_recordings_without_labels_are_negatives_where_several_labels_are_possible(
    autoencoder: Path, tmp_path: Path
) -> None:
    root = tones_in(tmp_path / "sounds", {"a": 10, "b": 10})
    rows = ["path,labels", *(f"a/{i:02}.wav,call" for i in range(10)), *(f"b/{i:02}.wav," for i in range(10))]
    (tmp_path / "calls.csv").write_text("\n".join(rows))
    data = {"manifest": str(tmp_path / "calls.csv"), "root": str(root)}
    with pytest.raises(UserError, match=r"all recordings have the one label 'call'; is data\.root one level too high"):
        tune(autoencoder, tmp_path / "single", data)
    result = tune(autoencoder, tmp_path / "run", data, "objective.labels=multi", "objective.class_weights=balanced")
    assert result is not None and result["classes"] == ["call"] and 0 <= result["map"] <= 1
    lines = (tmp_path / "run/predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 4  # two calls and two negatives
    scored = evaluate(tmp_path / "run", options.load(
        EvaluateOptions, None, [f"data.manifest={data['manifest']}", f"data.root={root}"]
    ))
    assert scored["unlabelled"] == 0 and scored["map"] is not None


def test_one_folder_is_no_set_of_classes(autoencoder: Path, tmp_path: Path) -> None:
    tones_in(tmp_path / "high" / "sounds", {"": 6})
    with pytest.raises(UserError, match="one level too high"):
        tune(autoencoder, tmp_path / "run", {"root": str(tmp_path / "high")})
    with pytest.raises(UserError, match="no recording has a label"):
        tune(autoencoder, tmp_path / "run", {"root": str(tmp_path / "high" / "sounds")})
    assert {file.name for file in (tmp_path / "run").iterdir()} <= {"lock"}
