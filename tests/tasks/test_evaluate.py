"""Scores of a classifier on recordings, the files they are written to, and how a checkpoint is opened."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trained_runs import CLASSES, damage, of, read_csv, write_sounds

from ssl_c2f.core import progress
from ssl_c2f.core.options import UserError
from ssl_c2f.data.manifest import Clip, Manifest, scan
from ssl_c2f.data.runner import mean_by_clip
from ssl_c2f.tasks.evaluate import EvaluateOptions, evaluate, print_confusion, print_scores, summarise, write_scores
from ssl_c2f.tasks.inference import RecordingOptions, open_inference, open_weights
from ssl_c2f.train import metrics

# scores


def recordings(labels: Tensor, classes: list[str]) -> Manifest:
    """What has the (n, C) labels."""
    names = [tuple(name for name, there in zip(classes, row, strict=True) if there) for row in labels.tolist()]
    return Manifest(Path("."), tuple(Clip(f"{i}.wav", each) for i, each in enumerate(names)), tuple(classes))


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), num_classes=st.integers(2, 6))
def test_scores_agree_with_each_other_and_with_the_predictions(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, num_classes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, num_classes, generator=generator).softmax(1)
    labels = torch.eye(num_classes)[torch.randint(num_classes, (n,), generator=generator)]
    classes = [f"class, {i}" for i in range(num_classes)]
    folder = tmp_path_factory.mktemp("scores")
    result = write_scores(folder, recordings(labels, classes), torch.arange(n), scores, {"more": math.nan})
    assert result == json.loads((folder / "scores.json").read_text())
    rows = read_csv(folder / "predictions.csv")
    right = sum(row["label"] == row["predicted"] for row in rows)
    confusion = torch.tensor(result["confusion"])
    assert len(rows) == n == confusion.sum() and right == confusion.trace() == round(result["accuracy"] * n)
    assert result["interval"][0] - 1e-9 < result["accuracy"] < result["interval"][1] + 1e-9
    assert result["more"] is None
    for i, name in enumerate(classes):
        of_class = [row for row in rows if row["label"] == name]
        share = sum(row["predicted"] == name for row in of_class) / len(of_class) if of_class else None
        assert result["recall"][name] == (share if share is None else pytest.approx(share))
        assert [float(row[f"score_{name}"]) for row in rows] == pytest.approx(scores[:, i].tolist(), abs=1e-6)


def test_scores_of_several_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
    scores = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.2], [0.6, 0.1, 0.3], [0.7, 0.3, 0.1]])
    result = write_scores(tmp_path, recordings(labels, ["x", "y", "z"]), torch.arange(4), scores, {})
    assert result["average_precision"] == {"x": 1.0, "y": pytest.approx((1 + 2 / 3) / 2), "z": None}
    assert result["map"] == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    rows = read_csv(tmp_path / "predictions.csv")
    assert [(row["label"], row["predicted"]) for row in rows] == [("x;y", "x"), ("y", "y"), ("", "x"), ("x", "x")]
    print_scores(result | {"folds": {"1": {"map": 0.5}, "2": {"map": None}}})
    out = capsys.readouterr().out
    low, high = result["interval"]
    assert 0 <= low < result["map"] < high <= 1 and f"mAP 0.9167 (95 % interval {low:.4f} to {high:.4f}), AUC" in out
    assert "fold 1 0.5000, fold 2 -; mean 0.5000 ± 0.0000" in out


@given(rows=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_precision_of_a_resample_is_that_of_its_clips(rows: list[tuple[int, bool, int]]) -> None:
    score, label, count = (np.array(column) for column in zip(*rows, strict=True))
    found = metrics.counted_precision(score.astype(float), label, count[:, None].astype(np.uint8))
    clips = [torch.from_numpy(np.repeat(column, count))[:, None] for column in (score, label)]
    wanted = metrics.multi_label(clips[0], clips[1])["map"]
    np.testing.assert_allclose(found, [wanted], rtol=1e-9, equal_nan=True)


def test_the_interval_of_map_is_as_wide_as_other_recordings_would_have_it() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        labels = (torch.rand(n, 3, generator=generator) < 0.3).float()
        return labels + torch.randn(n, 3, generator=generator), labels

    values = [metrics.multi_label(*draw(100))["map"] for _ in range(100)]
    scores, labels = draw(100)
    value = metrics.multi_label(scores, labels)["map"]
    low, high = metrics.map_interval(value, scores, labels)
    assert low < value < high and (high - low) / 2 == pytest.approx(1.96 * np.std(values), rel=0.3)
    assert metrics.map_interval(value, scores, labels) == (low, high)
    once = torch.cat([labels, torch.eye(100)[:, :1]], 1)  # of many resamples' clips none has the fourth class
    assert metrics.map_interval(value, torch.cat([scores, scores[:, :1]], 1), once)[0] < value
    assert "interval" not in summarise(scores, torch.zeros(100, 3), CLASSES)


def test_confusion_of_few_and_of_many_classes(capsys: pytest.CaptureFixture[str]) -> None:
    print_confusion(["cat", "dog", "none"], [[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert out[2] == ["0", "cat", "3", "1", ".", "0.7500"] and out[4] == ["2", "none", ".", ".", ".", "-"]
    many = torch.eye(30, dtype=torch.int64) * 9
    many[4, 17], many[5, 6] = 2, 5
    print_confusion([f"c{i}" for i in range(30)], many.tolist())
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert out[2:] == [["c5", "c6", "5"], ["c4", "c17", "2"]]


@given(frames=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12))
def test_windows_count_by_their_real_frames(frames: list[tuple[int, int]]) -> None:
    """The mean over windows is the mean over all frames of a recording, however they are cut."""
    index, count = (torch.tensor(column) for column in zip(*frames, strict=True))
    rows = torch.randn(len(frames), 2, generator=torch.Generator().manual_seed(0))
    means, found = mean_by_clip(rows, index, count)
    each = rows.repeat_interleave(count, dim=0)
    of_clip = index.repeat_interleave(count)
    for mean, clip in zip(means, found, strict=True):
        torch.testing.assert_close(mean, each[of_clip == clip].mean(0))


# evaluate


def test_evaluate_writes_what_it_returns(classifier: Path, tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(classifier, of(EvaluateOptions, tones, folds=[5]))
    folder = classifier / "evaluation" / "tones-fold-5"
    assert result == json.loads((folder / "scores.json").read_text())
    assert result["clips"] == 3 and result["seen_in_training"] == 0 and result["classes"] == list(CLASSES)
    assert {row["path"] for row in read_csv(folder / "predictions.csv")} == {f"{name}/5-4-A.wav" for name in CLASSES}
    assert "note:" not in capsys.readouterr().out
    evaluate(classifier, of(EvaluateOptions, tones, resolution="trained"))
    assert (classifier / "evaluation" / "tones-trained" / "scores.json").exists()


def test_evaluate_says_what_was_trained_on(
    classifier: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(classifier, of(EvaluateOptions, tones, out=str(tmp_path / "all")))["seen_in_training"] == 12
    assert "trained on 12 of these 15" in capsys.readouterr().out
    others = write_sounds(tmp_path / "others", per_class=2)
    assert evaluate(classifier, of(EvaluateOptions, others, out=str(tmp_path / "o")))["seen_in_training"] == 0


def test_evaluate_keeps_the_models_classes_apart(classifier: Path, tones: Path, tmp_path: Path) -> None:
    """A set that lacks the model's first class is scored in the model's columns, not in its own."""
    all_of_them = evaluate(classifier, of(EvaluateOptions, tones, out=str(tmp_path / "all")))
    some = write_sounds(tmp_path / "some", CLASSES[1:])
    result = evaluate(classifier, of(EvaluateOptions, some, out=str(tmp_path / "out")))
    assert result["confusion"] == [[0, 0, 0], *all_of_them["confusion"][1:]]
    assert result["recall"] == all_of_them["recall"] | {CLASSES[0]: None}


def test_evaluate_is_the_same_in_any_batch(classifier: Path, tones: Path, tmp_path: Path) -> None:
    tables = []
    for size, cache in ((1, 0.0), (7, 4.0)):
        data = {"root": str(tones), "cache_gb": cache}
        evaluate(classifier, of(EvaluateOptions, tones, batch_size=size, data=data, out=str(tmp_path / str(size))))
        tables.append(read_csv(tmp_path / str(size) / "predictions.csv"))
    for one, other in zip(*tables, strict=True):
        assert one["path"] == other["path"]
        assert float(one["score_chirp_up"]) == pytest.approx(float(other["score_chirp_up"]), abs=2e-5)


def test_evaluate_refuses_in_one_line(classifier: Path, autoencoder: Path, tones: Path, tmp_path: Path) -> None:
    unknown = write_sounds(tmp_path / "unknown", ("chirp_up", "fm_fast"), per_class=1)
    with pytest.raises(UserError, match=r"fm_fast/1-0-A.wav: .* label 'fm_fast' \(it knows chirp_down, chirp_up, cl"):
        evaluate(classifier, of(EvaluateOptions, unknown))
    with pytest.raises(UserError, match="objective mae and has no classifier"):
        evaluate(autoencoder, of(EvaluateOptions, tones))
    with pytest.raises(UserError, match=r"in fold 9; there are \[1, 2, 3, 4, 5\]"):
        evaluate(classifier, of(EvaluateOptions, tones, folds=[9]))
    with pytest.raises(UserError, match=r"choose folds with folds=\[5\]"):
        of(EvaluateOptions, tones, data={"root": "x", "val_folds": [5]})
    with pytest.raises(UserError, match=r"no recording of .* is left"):
        evaluate(classifier, of(EvaluateOptions, tones / CLASSES[0]))  # nothing has a label there


@pytest.mark.parametrize("cache_gb", [0.0, 4.0])
def test_unreadable_files_are_named_and_shift_nothing(
    classifier: Path, tmp_path: Path, cache_gb: float, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_sounds(tmp_path / "sounds", per_class=2)
    data = {"root": str(root), "cache_gb": cache_gb}
    clean = evaluate(classifier, of(EvaluateOptions, root, data=data, out=str(tmp_path / "clean")))
    (root / CLASSES[0] / "1-00-A.wav").write_text("no audio")
    damage(root / CLASSES[1], "1-00-A.wav")  # in a batch of its own, of which nothing is left
    result = evaluate(classifier, of(EvaluateOptions, root, data=data, batch_size=1, out=str(tmp_path / "bad")))
    reasons = {"chirp_down/1-00-A.wav": "damaged, or not audio", "chirp_up/1-00-A.wav": "NaN or infinite samples"}
    assert result["bad_files"] == reasons
    assert result["clips"] == clean["clips"] == 6 and result["confusion"] == clean["confusion"]
    errors = capsys.readouterr().err.splitlines()
    assert errors == [*(f"skipped {path}: {why}" for path, why in reasons.items()), "unreadable files skipped: 2"]
    with pytest.raises(UserError, match="max_bad_files=1"):
        evaluate(classifier, of(EvaluateOptions, root, data={**data, "max_bad_files": 1}))


def test_nothing_readable_is_one_line(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "chirp_up").mkdir()
    damage(tmp_path / "chirp_up", "a.wav")
    with pytest.raises(UserError, match=r"none of 1 recordings can be read; chirp_up/a.wav: NaN"):
        evaluate(classifier, of(EvaluateOptions, tmp_path))


# opening a checkpoint


def test_both_resolutions_are_the_same_at_time_factor_1(classifier: Path, tones: Path) -> None:
    rows = []
    for resolution in ("full", "trained"):
        options = of(RecordingOptions, tones, resolution=resolution)
        inference = open_inference(open_weights(classifier), options, scan(tones), options.data)
        rows.append(inference.run(inference.objective.embed, "").values)
    assert torch.equal(*rows)


def test_the_checkpoints_own_statistics_are_used(classifier: Path, tmp_path: Path) -> None:
    """Recordings that are all louder must look louder to the model."""
    root = write_sounds(tmp_path / "quiet", per_class=1)
    options = RecordingOptions(device="cpu")
    weights = open_weights(classifier)
    front_end = open_inference(weights, options, scan(root), options.data).runner.front_end
    assert front_end.statistics == weights.statistics[front_end.geometry.digest()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there(classifier: Path, tones: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device cuda: there is none"):
        evaluate(classifier, of(EvaluateOptions, tones, device="cuda", out=str(tmp_path)))


def test_count_is_silent_when_short(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Count("reading") as count:
        count.update(1, 2)
    assert capsys.readouterr().err == ""
    with progress.Count("reading", log_seconds=0.0) as count:
        count.update(1, 2)
    assert capsys.readouterr().err.startswith("reading  1/2  ")


def test_summaries_do_not_depend_on_the_order_of_clips() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(20, 3, generator=generator), torch.eye(3)[torch.arange(20) % 3]
    order = torch.randperm(20, generator=generator)
    assert summarise(scores, labels, CLASSES) == summarise(scores[order], labels[order], CLASSES)
    assert metrics.accuracy(scores, labels) == summarise(scores, labels, CLASSES)["accuracy"]
