"""Features and labels of recordings: the right rows, at the right times, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import soundfile
from trained_runs import CLASSES, RATE, damage, of, read_csv

from ssl_c2f.core.options import UserError
from ssl_c2f.data.synthetic import render
from ssl_c2f.tasks.embed import EmbedOptions, embed
from ssl_c2f.tasks.evaluate import EvaluateOptions, evaluate
from ssl_c2f.tasks.inference import open_weights
from ssl_c2f.tasks.predict import PredictOptions, predict

# embed


def test_every_format_holds_the_same_features(autoencoder: Path, tones: Path, tmp_path: Path) -> None:
    for ending in ("npz", "safetensors", "csv"):
        file = str(tmp_path / f"f.{ending}")
        embed(autoencoder, of(EmbedOptions, tones, out=file, windows=True, readout="mean_std"))
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


def test_windows_cover_a_recording_in_order(autoencoder: Path, tones: Path, tmp_path: Path) -> None:
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
    geometry = open_weights(autoencoder).geometry
    frames = np.array([int(geometry.frames(n)) for n in (4000, 4000, 4000, 400)], np.float32)
    mean = (windows["features"][:4] * frames[:, None]).sum(0) / frames.sum()
    assert np.allclose(np.load(file)["features"][0], mean, atol=1e-5)


def test_a_file_that_cannot_be_written_leaves_nothing(autoencoder: Path, tones: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f.mat should end in .npz, .safetensors, .csv"):
        embed(autoencoder, of(EmbedOptions, tones, out=str(tmp_path / "f.mat")))
    (tmp_path / "f.npz").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*f.npz"):
        embed(autoencoder, of(EmbedOptions, tones, out=str(tmp_path / "f.npz")))
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
    with pytest.raises(UserError, match="out must be given"):
        of(EmbedOptions, tones)


@pytest.mark.parametrize("cache_gb", [0.0, 4.0])
def test_a_recording_is_used_whole_or_not_at_all(autoencoder: Path, tmp_path: Path, cache_gb: float) -> None:
    (tmp_path / "x").mkdir()
    wave = np.concatenate([render(name, 3, 0.5, RATE) for name in CLASSES])
    soundfile.write(tmp_path / "x" / "good.wav", wave, RATE, subtype="FLOAT")
    wave[5000] = np.nan  # in the second window; the first and the third can be read
    soundfile.write(tmp_path / "x" / "bad.wav", wave, RATE, subtype="FLOAT")
    values = dict(data={"root": str(tmp_path), "cache_gb": cache_gb}, out=str(tmp_path / "f.npz"), windows=True)
    embed(autoencoder, of(EmbedOptions, tmp_path, **values))
    rows = np.load(tmp_path / "f.npz")
    assert rows["paths"].tolist() == ["x/good.wav"] * 3 and rows["start_seconds"].tolist() == [0.0, 0.5, 1.0]


# predict


def test_predict_agrees_with_evaluate(classifier: Path, tones: Path, tmp_path: Path) -> None:
    evaluate(classifier, of(EvaluateOptions, tones, out=str(tmp_path)))
    scored = {row["path"]: row for row in read_csv(tmp_path / "predictions.csv")}
    single = tones / "chirp_up" / "2-1-A.wav"
    rows = predict(classifier, [tones, single], PredictOptions(device="cpu"))
    assert len(rows) == len(scored) == 15
    for row in rows:
        want = scored[Path(row.path).relative_to(tones).as_posix()]
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
