"""What is done with a finished checkpoint: scores, probes, features and labels of recordings."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ssl_c2f import engine, metrics, options, probe, progress
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.manifest import scan
from ssl_c2f.data.synthetic import render
from ssl_c2f.embed import EmbedOptions, embed
from ssl_c2f.evaluate import EvaluateOptions, evaluate, print_confusion, print_scores, summarise, write_scores
from ssl_c2f.inference import RecordingOptions, open_corpus, open_model, run_windows
from ssl_c2f.options import UserError
from ssl_c2f.predict import PredictOptions, predict
from ssl_c2f.probe import ProbeOptions, deal, linear_scores, probe_fold, standardise
from ssl_c2f.recipe import RunOptions
from ssl_c2f.validate import mean_by_clip

CLASSES = ("chirp_down", "chirp_up", "clicks_slow")
RATE = 8000


def write_sounds(folder: Path, classes: tuple[str, ...] = CLASSES, per_class: int = 5, seconds: float = 0.5) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            soundfile.write(folder / name / f"{i % 5 + 1}-{i}-A.wav", render(name, i, seconds, RATE), RATE)
    return folder


def train(folder: Path, root: Path, **objective: Any) -> Path:
    options_of_run = options.load(RunOptions, None, (), {
        "data": {"root": str(root), "val_folds": [5]},
        "audio": {"sample_rate": RATE, "clip_seconds": 0.5, "num_mels": 32},
        "model": {"width": 16, "depth": 1, "heads": 2, "patch_f": 16, "patch_t": 8},
        "objective": objective, "phases": [{"name": "only", "steps": 4, "batch_size": 8, "lr": 1e-2}],
        "train": {"rehearse": False, "device": "cpu"}, "tracking": {"wandb": "off"},
    })
    engine.run(options_of_run, folder)
    return folder


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("sounds") / "tones")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, sounds: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "classifier", sounds, name="supervised")


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory, sounds: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "mae", sounds, name="mae", decoder_width=16, decoder_depth=1)


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def of(model: Any, root: Path, **values: Any) -> Any:
    return options.load(model, None, (), {"data": {"root": str(root)}, "device": "cpu", **values})


# scores


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
    result = write_scores(folder, [f"{i}.wav" for i in range(n)], scores, labels, classes, {"more": math.nan})
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
    result = write_scores(tmp_path, list("abcd"), scores, labels, ["x", "y", "z"])
    assert result["average_precision"] == {"x": 1.0, "y": pytest.approx((1 + 2 / 3) / 2), "z": None}
    assert result["map"] == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    rows = read_csv(tmp_path / "predictions.csv")
    assert [(row["label"], row["predicted"]) for row in rows] == [("x;y", "x"), ("y", "y"), ("", "x"), ("x", "x")]
    print_scores(result | {"folds": {"1": {"map": 0.5}, "2": {"map": None}}})
    out = capsys.readouterr().out
    assert "mAP 0.9167" in out and "fold 1 0.5000, fold 2 -; mean 0.5000 ± 0.0000" in out


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


def test_evaluate_writes_what_it_returns(classifier: Path, sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(classifier, of(EvaluateOptions, sounds, folds=[5]))
    folder = classifier / "evaluation" / "tones-fold-5"
    assert result == json.loads((folder / "scores.json").read_text())
    assert result["clips"] == 3 and result["seen_in_training"] == 0 and result["classes"] == list(CLASSES)
    assert {row["path"] for row in read_csv(folder / "predictions.csv")} == {f"{name}/5-4-A.wav" for name in CLASSES}
    assert "note:" not in capsys.readouterr().out


def test_evaluate_says_what_was_trained_on(
    classifier: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(classifier, of(EvaluateOptions, sounds, out=str(tmp_path / "all")))["seen_in_training"] == 12
    assert "trained on 12 of these 15" in capsys.readouterr().out
    others = write_sounds(tmp_path / "others", per_class=2)
    assert evaluate(classifier, of(EvaluateOptions, others, out=str(tmp_path / "o")))["seen_in_training"] == 0


def test_evaluate_keeps_the_models_classes_apart(classifier: Path, sounds: Path, tmp_path: Path) -> None:
    """A set that lacks the model's first class is scored in the model's columns, not in its own."""
    all_of_them = evaluate(classifier, of(EvaluateOptions, sounds, out=str(tmp_path / "all")))
    some = write_sounds(tmp_path / "some", CLASSES[1:])
    result = evaluate(classifier, of(EvaluateOptions, some, out=str(tmp_path / "out")))
    assert result["confusion"] == [[0, 0, 0], *all_of_them["confusion"][1:]]
    assert result["recall"] == all_of_them["recall"] | {CLASSES[0]: None}


def test_evaluate_is_the_same_in_any_batch(classifier: Path, sounds: Path, tmp_path: Path) -> None:
    tables = []
    for size, cache in ((1, 0.0), (7, 4.0)):
        data = {"root": str(sounds), "cache_gb": cache}
        evaluate(classifier, of(EvaluateOptions, sounds, batch_size=size, data=data, out=str(tmp_path / str(size))))
        tables.append(read_csv(tmp_path / str(size) / "predictions.csv"))
    for one, other in zip(*tables, strict=True):
        assert one["path"] == other["path"]
        assert float(one["score_chirp_up"]) == pytest.approx(float(other["score_chirp_up"]), abs=2e-5)


def test_evaluate_refuses_in_one_line(classifier: Path, autoencoder: Path, sounds: Path, tmp_path: Path) -> None:
    unknown = write_sounds(tmp_path / "unknown", ("chirp_up", "fm_fast"), per_class=1)
    with pytest.raises(UserError, match=r"fm_fast/1-0-A.wav: .* label 'fm_fast' \(it knows chirp_down, chirp_up, cl"):
        evaluate(classifier, of(EvaluateOptions, unknown))
    with pytest.raises(UserError, match="objective mae and has no classifier"):
        evaluate(autoencoder, of(EvaluateOptions, sounds))
    with pytest.raises(UserError, match=r"in fold 9; there are \[1, 2, 3, 4, 5\]"):
        evaluate(classifier, of(EvaluateOptions, sounds, folds=[9]))
    with pytest.raises(UserError, match=r"choose folds with folds=\[5\]"):
        of(EvaluateOptions, sounds, data={"root": "x", "val_folds": [5]})
    with pytest.raises(UserError, match=r"no recording of .* is left"):
        evaluate(classifier, of(EvaluateOptions, sounds / CLASSES[0]))  # nothing has a label there


def damage(folder: Path, name: str) -> None:
    """Audio whose header is fine and whose samples are not."""
    soundfile.write(folder / name, np.full(4000, np.nan, np.float32), RATE, subtype="FLOAT")


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


# probe


@given(
    counts=st.lists(st.integers(1, 13), min_size=1, max_size=5), k=st.integers(2, 6), seed=st.integers(0, 99)
)
def test_dealt_folds_are_even_and_stratified(counts: list[int], k: int, seed: int) -> None:
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    shuffled = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))]
    folds = deal(torch.eye(len(counts))[shuffled], k, seed)
    for clips in (folds, *(folds[shuffled == i] for i in range(len(counts)))):
        sizes = torch.bincount(clips, minlength=k + 1)[1:]
        assert int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(folds, deal(torch.eye(len(counts))[shuffled], k, seed))


def blobs(n: int, num_classes: int, seed: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % num_classes
    x = torch.randn(n, 12, generator=generator)
    return x + spread * torch.randn(num_classes, 12, generator=generator)[target], torch.eye(num_classes)[target], (
        torch.arange(n) // num_classes % 5 + 1
    )


def test_the_path_of_regressions_equals_separate_ones() -> None:
    x, labels, _ = blobs(60, 3, 0, 0.5)
    path = linear_scores(x, labels, x, [1e-3, 1.0], single=True)
    for strength, scores in zip((1e-3, 1.0), path, strict=True):
        model = LogisticRegression(C=strength, max_iter=2000, tol=1e-6).fit(x.numpy(), labels.argmax(1).numpy())
        assert np.abs(model.predict_proba(x.numpy()) - scores.numpy()).max() < 0.01
    several = torch.stack([labels[:, 0], 1 - labels[:, 1], torch.zeros(60)], dim=1)
    (scores,) = linear_scores(x, several, x, [1.0], single=False)
    model = LogisticRegression(C=1.0, max_iter=2000, tol=1e-6).fit(x.numpy(), several[:, 1].numpy())
    assert np.abs(model.predict_proba(x.numpy())[:, 1] - scores[:, 1].numpy()).max() < 0.01
    assert not scores[:, 2].any()


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), fold=st.integers(1, 5))
def test_a_fold_has_no_say_in_how_it_is_judged(seed: int, fold: int) -> None:
    """Whatever the features and labels of the held-out fold, C and the classifier come from the others alone."""
    x, labels, folds = blobs(30, 3, seed, 0.7)
    few = ProbeOptions(strengths=(1e-3, 1e-1))
    result = probe_fold(x, labels, folds, fold, few)
    other_x, other_labels = x.clone(), labels.clone()
    other_x[folds == fold] = other_x[folds == fold] * 100 + 7
    other_labels[folds == fold] = other_labels[folds == fold].roll(1, dims=1)
    assert probe_fold(other_x, other_labels, folds, fold, few)["C"] == result["C"]
    flipped = probe_fold(x, other_labels, folds, fold, few)
    assert result["linear"] + flipped["linear"] <= 1 + 1e-6 and result["clips"] == int((folds == fold).sum())


def test_features_without_information_are_at_chance() -> None:
    """The classic leak (scaling or choosing C with the held-out fold in it) shows as better than chance."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(3):
        x = torch.randn(100, 200, generator=generator)
        labels = torch.eye(2)[torch.randint(2, (100,), generator=generator)]
        folds = torch.arange(100) % 5 + 1
        weak = ProbeOptions(strengths=(1e-2,))
        values += [probe_fold(x, labels, folds, fold, weak)["linear"] for fold in range(1, 6)]
    assert abs(sum(values) / len(values) - 0.5) < 0.1
    x, labels, folds = blobs(60, 3, 1)
    assert probe_fold(x, labels, folds, 1, ProbeOptions(strengths=(1e-2, 1.0)))["linear"] == 1.0


def test_the_strength_that_generalises_is_chosen() -> None:
    """Two thirds are of one class. Useless features are best all but ignored, a useful one is best used."""
    generator = torch.Generator().manual_seed(0)
    labels, folds = torch.eye(2)[(torch.arange(60) % 3 == 0).long()], torch.arange(60) // 3 % 5 + 1
    for order in ((1e-6, 1.0), (1.0, 1e-6)):
        both = ProbeOptions(strengths=order)
        useless = torch.randn(60, 300, generator=generator)
        useful = 4 * labels[:, 1:] + 0.1 * torch.randn(60, 1, generator=generator)
        assert probe.choose_strength(useless, labels, folds, both, True) == 1e-6
        assert probe.choose_strength(useful, labels, folds, both, True) == 1.0
        equal = torch.eye(2)[torch.arange(60) % 2]  # where both are right, the stronger regularisation
        assert probe.choose_strength(equal * 9, equal, torch.arange(60) // 2 % 5 + 1, both, True) == 1e-6


def test_standardise_survives_constant_features() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    a, b = standardise(x, torch.tensor([[2.0, 6.0]]))
    assert torch.equal(a, torch.tensor([[-1.0, 0.0], [1.0, 0.0]])) and torch.equal(b, torch.tensor([[0.0, 1.0]]))


@given(frames=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_log_mel_statistics_ignore_padding(frames: list[int]) -> None:
    spec = torch.randn(len(frames), 6, 3, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(1)
    batch = Batch(spec, torch.tensor(frames), none, none, none, geometry=None, short=True)  # type: ignore[arg-type]
    for row, clip, n in zip(probe.log_mel_statistics(batch), spec, frames, strict=True):
        want = torch.cat([clip[:n].mean(0), clip[:n].std(0, correction=0)])
        torch.testing.assert_close(row, want, atol=1e-6, rtol=1e-5)


def test_probe_of_a_checkpoint(autoencoder: Path, sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = probe.probe(autoencoder, of(ProbeOptions, sounds, strengths=[0.01, 1.0]))
    assert json.loads((autoencoder / "probe" / "tones" / "probe.json").read_text()) == result
    names = [(row["features"], row["readout"]) for row in result["rows"]]
    assert names == [(n, r) for n in ("checkpoint", "random encoder", "log-mel") for r in ("mean", "mean+std")]
    for row in result["rows"]:
        folds = [row["folds"][str(i)]["linear"] for i in range(1, 6)]
        assert row["linear"]["mean"] == pytest.approx(sum(folds) / 5)
        assert row["linear"]["std"] == pytest.approx(np.std(folds, ddof=1))
    assert "own 5 folds (15 recordings)" in capsys.readouterr().out
    bare = of(ProbeOptions, sounds, strengths=[1.0], baseline=False, random=False)
    again = probe.probe(autoencoder, bare)["rows"]
    assert [row["knn"] for row in again] == [row["knn"] for row in result["rows"][:2]]


def test_probe_makes_folds_where_there_are_none(autoencoder: Path, tmp_path: Path) -> None:
    root = write_sounds(tmp_path / "sounds", per_class=4)
    for file in root.rglob("*.wav"):
        file.rename(file.with_name(f"clip{file.name[0]}.wav"))
    values = dict(random=False, strengths=[1.0], splits=2, out=str(tmp_path))
    result = probe.probe(autoencoder, of(ProbeOptions, root, **values))
    assert result["split"] == "2 stratified folds, seed 0"
    assert [fold["clips"] for fold in result["rows"][0]["folds"].values()] == [6, 6]
    with pytest.raises(UserError, match="12 labelled recordings are too few for 13 folds"):
        probe.probe(autoencoder, of(ProbeOptions, root, splits=13))
    with pytest.raises(UserError, match="at least two classes"):
        probe.probe(autoencoder, of(ProbeOptions, write_sounds(tmp_path / "one", CLASSES[:1], 2)))


def test_probe_of_several_labels(autoencoder: Path, sounds: Path, tmp_path: Path) -> None:
    lines = ["path,labels,fold"] + [
        f"{clip.path},{clip.labels[0]}{';early' if clip.fold in (1, 2, 4) and i % 2 else ''},{clip.fold}"
        for i, clip in enumerate(scan(sounds).clips)
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    data = {"root": str(sounds), "manifest": str(tmp_path / "list.csv")}
    values = dict(data=data, random=False, strengths=[1.0], out=str(tmp_path))
    result = probe.probe(autoencoder, of(ProbeOptions, sounds, **values))
    assert all(row["metric"] == "map" and 0 < row["linear"]["mean"] <= 1 for row in result["rows"])
    assert result["classes"] == [*CLASSES, "early"]


# embed


def test_every_format_holds_the_same_features(autoencoder: Path, sounds: Path, tmp_path: Path) -> None:
    for ending in ("npz", "safetensors", "csv"):
        file = str(tmp_path / f"f.{ending}")
        embed(autoencoder, of(EmbedOptions, sounds, out=file, windows=True, readout="mean_std"))
    arrays = np.load(tmp_path / "f.npz")
    tensors = safetensors.numpy.load_file(tmp_path / "f.safetensors")
    with safetensors.safe_open(tmp_path / "f.safetensors", "np") as opened:
        facts = opened.metadata()
    rows = read_csv(tmp_path / "f.csv")
    assert arrays["features"].dtype == np.float32 and arrays["features"].shape == (15, 32)
    assert np.array_equal(arrays["features"], tensors["features"])
    assert np.array_equal(arrays["features"], np.array([[row[f"f{i}"] for i in range(32)] for row in rows], np.float32))
    assert arrays["paths"].tolist() == json.loads(facts["paths"]) == [row["path"] for row in rows]
    assert arrays["labels"].tolist() == json.loads(facts["labels"]) == [path.split("/")[0] for path in arrays["paths"]]
    assert np.array_equal(arrays["start_seconds"], tensors["start_seconds"]) and facts["readout"] == "mean_std"
    assert len(np.unique(arrays["features"][:, 0])) == 15


def test_windows_cover_a_recording_in_order(autoencoder: Path, sounds: Path, tmp_path: Path) -> None:
    """A recording made of others has their features at the right times, though a file before it cannot be read."""
    (tmp_path / "x").mkdir()
    parts = [render(name, 3, 0.5, RATE) for name in CLASSES]
    soundfile.write(tmp_path / "x" / "long.wav", np.concatenate([*parts, parts[0][:400]]), RATE, subtype="FLOAT")
    damage(tmp_path / "x", "a.wav")
    soundfile.write(tmp_path / "x" / "one.wav", parts[1], RATE, subtype="FLOAT")
    file = str(tmp_path / "f.npz")
    embed(autoencoder, of(EmbedOptions, tmp_path, out=file, windows=True, batch_size=3))
    windows = np.load(file)
    assert windows["paths"].tolist() == ["x/long.wav"] * 4 + ["x/one.wav"]
    assert windows["start_seconds"].tolist() == [0.0, 0.5, 1.0, 1.5, 0.0]
    assert np.allclose(windows["features"][1], windows["features"][4], atol=1e-4)
    assert not np.allclose(windows["features"][0], windows["features"][4], atol=1e-2)
    embed(autoencoder, of(EmbedOptions, tmp_path, out=file))
    model = open_model(autoencoder, RecordingOptions(device="cpu"))
    frames = np.array([int(model.geometry.frames(n)) for n in (4000, 4000, 4000, 400)], np.float32)
    mean = (windows["features"][:4] * frames[:, None]).sum(0) / frames.sum()
    assert np.allclose(np.load(file)["features"][0], mean, atol=1e-5)


def test_a_file_that_cannot_be_written_leaves_nothing(autoencoder: Path, sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f.mat should end in .npz, .safetensors, .csv"):
        embed(autoencoder, of(EmbedOptions, sounds, out=str(tmp_path / "f.mat")))
    (tmp_path / "f.npz").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*f.npz"):
        embed(autoencoder, of(EmbedOptions, sounds, out=str(tmp_path / "f.npz")))
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
    with pytest.raises(UserError, match="out must be given"):
        of(EmbedOptions, sounds)


# predict


def test_predict_agrees_with_evaluate(classifier: Path, sounds: Path, tmp_path: Path) -> None:
    evaluate(classifier, of(EvaluateOptions, sounds, out=str(tmp_path)))
    scored = {row["path"]: row for row in read_csv(tmp_path / "predictions.csv")}
    single = sounds / "chirp_up" / "2-1-A.wav"
    rows = predict(classifier, [sounds, single], PredictOptions(device="cpu"))
    assert len(rows) == len(scored) == 15
    for row in rows:
        want = scored[Path(row.path).relative_to(sounds).as_posix()]
        assert row.predicted == [want["predicted"]] and row.start_seconds == 0 and row.end_seconds == 0.5
        assert [row.scores[name] for name in CLASSES] == pytest.approx(
            [float(want[f"score_{name}"]) for name in CLASSES], abs=2e-5
        )
        assert sum(row.scores.values()) == pytest.approx(1)


def test_timeline_in_every_form(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wave = np.concatenate([render(name, 3, 0.5, RATE) for name in CLASSES])[:11000]
    soundfile.write(tmp_path / "long, really.wav", wave, RATE)
    (tmp_path / "bad.wav").write_text("no audio")
    rows = predict(classifier, [tmp_path], PredictOptions(device="cpu", timeline=True, top=1))
    assert [(row.start_seconds, row.end_seconds) for row in rows] == [(0.0, 0.5), (0.5, 1.0), (1.0, 1.375)]
    shown = capsys.readouterr()
    assert "skipped " in shown.err and "unreadable files skipped: 1" in shown.err
    assert shown.out.splitlines()[2].endswith(f"0.00  0.50  {rows[0].predicted[0]} {max(rows[0].scores.values()):.3f}")
    for ending in ("csv", "json"):
        out = str(tmp_path / f"out.{ending}")
        predict(classifier, [tmp_path], PredictOptions(device="cpu", timeline=True, out=out))
    objects, table = json.loads((tmp_path / "out.json").read_text()), read_csv(tmp_path / "out.csv")
    for row, read, cells in zip(rows, objects, table, strict=True):
        assert read == vars(row)
        assert cells["path"] == row.path and float(cells["end_seconds"]) == row.end_seconds
        assert float(cells["score_chirp_up"]) == pytest.approx(row.scores["chirp_up"], abs=1e-6)


def test_predict_refuses_in_one_line(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audio found"):
        predict(classifier, [tmp_path], PredictOptions(device="cpu"))
    with pytest.raises(UserError, match="name recordings or folders"):
        predict(classifier, [], PredictOptions(device="cpu"))
    with pytest.raises(UserError, match=r"none of 1 recordings can be read; .*missing.wav: no such file"):
        predict(classifier, [tmp_path / "missing.wav"], PredictOptions(device="cpu"))
    damage(tmp_path, "nan.wav")
    with pytest.raises(UserError, match=r"none of 2 recordings can be read"):
        predict(classifier, [tmp_path, tmp_path / "missing.wav"], PredictOptions(device="cpu"))
    with pytest.raises(UserError, match=r"should end in .csv or .json"):
        predict(classifier, [tmp_path], PredictOptions(device="cpu", out="x.txt"))


# opening a checkpoint


def test_both_resolutions_are_the_same_at_time_factor_1(classifier: Path, sounds: Path) -> None:
    rows = []
    for resolution in ("full", "trained"):
        model = open_model(classifier, of(RecordingOptions, sounds, resolution=resolution))
        corpus = open_corpus(scan(sounds), range(15), RecordingOptions().data, model)
        rows.append(run_windows(model, corpus, lambda batch, m=model: m.objective.embed(batch), "").values)  # type: ignore[misc]
    assert torch.equal(*rows)


def test_the_checkpoints_own_statistics_are_used(classifier: Path, tmp_path: Path) -> None:
    """Recordings that are all louder must look louder to the model."""
    root = write_sounds(tmp_path / "quiet", per_class=1)
    model = open_model(classifier, RecordingOptions(device="cpu"))
    corpus = open_corpus(scan(root), range(3), RecordingOptions().data, model)
    assert corpus.statistics(model.geometry) == model.weights.statistics[model.geometry.digest()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there(classifier: Path) -> None:
    with pytest.raises(UserError, match="device cuda: there is none"):
        open_model(classifier, RecordingOptions(device="cuda"))


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
