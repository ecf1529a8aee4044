"""Report pages of supervised runs, made by the functions behind the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import Page, page_of
from tiny_runs import DEFAULTS, records, run_options

from ssl_c2f.core import options
from ssl_c2f.tasks.finetune import FinetuneOptions, checkpoint_defaults, finetune
from ssl_c2f.train import engine
from ssl_c2f.train.weights import load_weights


@pytest.fixture(scope="module")
def page(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a classifier that was trained in three phases."""
    run = tmp_path_factory.mktemp("runs") / "labelled"
    engine.run(run_options(sounds, "objective={name: supervised}", "evaluation.every=1"), run, kind="train")
    assert all("mask_ratio" not in line for line in records(run))
    return page_of(run)


def test_masks_and_nearest_neighbours_are_not_mentioned(page: Page) -> None:
    assert set(page.data["runs"][0]["curves"]) == {"classifier", "loss", "lr", "tokens"}
    assert "The classifier on held-out clips" in page.text
    assert "No validation" not in page.text
    assert "Mask ratio" not in page.text and "Nearest neighbours" not in page.text and "masked" not in page.text


def test_every_phase_shows_and_plays_its_input(page: Page) -> None:
    assert "No pictures" not in page.text
    assert page.tags.count("img") == 3 * 3 and page.tags.count("audio") == 3
    for phase, frame in (("coarse", 40), ("middle", 20), ("fine", 10)):
        assert page.text.count(f"{phase}: frames of {frame} ms") == 3


def write_manifest(sounds: Path, file: Path) -> Path:
    """The recordings with two labels each: the kind of sound, and its variant."""
    lines = ["path,labels,fold"]
    for path in sorted(sounds.glob("*/*.wav")):
        lines.append(f"{path},{path.parent.name.replace('_', ';')},{path.name[0]}")
    file.write_text("\n".join(lines) + "\n")
    return file


def test_several_labels_from_training_to_the_page(
    sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data.manifest={write_manifest(sounds, tmp_path / 'sounds.csv')}"
    run, multi = tmp_path / "several", "objective={name: supervised, labels: multi}"
    engine.run(run_options(sounds, data, multi, "evaluation.every=1"), run, kind="train")
    weights = load_weights(run)
    tune = options.load(FinetuneOptions, None, [data, multi, "folds=[4,5]"], {
        **checkpoint_defaults(weights), "phases": DEFAULTS["phases"][-1:], "train": DEFAULTS["train"],
        "tracking": DEFAULTS["tracking"],
    })
    capsys.readouterr()
    scores = json.loads((finetune(run, tune) / "scores.json").read_text())
    low, high = scores["interval"]
    assert 0 <= low < scores["map"] < high <= 1
    assert f"mAP {scores['map']:.4f} (95 % interval {low:.4f} to {high:.4f}), AUC " in capsys.readouterr().out
    page = page_of(run)
    assert f"{100 * low:.1f} to {100 * high:.1f} %" in page.text and f"{100 * scores['map']:.1f} % mAP" in page.text
    bars = page.data["bars"]["default"]
    assert bars["measure"] == "average precision" and dict(bars["rows"]) == scores["average_precision"]
    assert len(bars["rows"]) == len(scores["classes"]) > 8 and "Average precision per class, default" in page.text
    assert page.data["matrices"] == {} and "classifier" in page.data["runs"][0]["curves"]
