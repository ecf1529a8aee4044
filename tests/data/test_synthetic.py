from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_c2f.data.manifest import scan
from ssl_c2f.data.synthetic import CLASSES, render, write_dataset

RATE = 16000


def log_mel_like(clip: np.ndarray) -> np.ndarray:
    """Log power in 40 bands of growing width, every 10 ms: (T, 40)."""
    frames = np.lib.stride_tricks.sliding_window_view(clip, 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    edges = np.unique(np.geomspace(4, 257, 41).round().astype(int))
    return np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-6)


@pytest.mark.slow
def test_mean_spectra_alone_do_not_tell_the_classes_apart() -> None:
    """The same classifier does far better once it is also told how a clip unfolds."""
    spectra = [[log_mel_like(render(name, seed, 2.0, RATE)) for seed in range(40)] for name in CLASSES]
    mean = np.array([[s.mean(0) for s in row] for row in spectra])
    quarters = np.array([[[q.mean(0) for q in np.array_split(s, 4)] for s in row] for row in spectra])
    changes = np.array([[np.abs(np.diff(s[::4], axis=0)).mean(0) for s in row] for row in spectra])
    loudness = [[np.abs(np.fft.rfft(s.mean(1) - s.mean(), 512))[1:160] for s in row] for row in spectra]
    structure = np.concatenate([quarters.reshape(*mean.shape[:2], -1), changes, np.array(loudness)], axis=2)

    def accuracy(features: np.ndarray) -> float:
        labels = np.arange(len(CLASSES))[:, None].repeat(features.shape[1], axis=1)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        model.fit(np.concatenate(features[:, :25]), labels[:, :25].ravel())
        return float(model.score(np.concatenate(features[:, 25:]), labels[:, 25:].ravel()))

    flat, structured = accuracy(mean), accuracy(np.concatenate([mean, structure], axis=2))
    assert flat < 0.5  # measured: 0.32, and 0.87
    assert structured > 0.75


@pytest.mark.parametrize("name", CLASSES)
def test_clips_are_finite_bounded_and_repeatable(name: str) -> None:
    for seconds, rate in ((2.0, RATE), (0.05, 8000), (0.5, 96000)):
        clip = render(name, 3, seconds, rate)
        assert clip.shape == (round(seconds * rate),)
        assert clip.dtype == np.float32
        assert 0.05 < np.abs(clip).max() <= 1
        np.testing.assert_array_equal(clip, render(name, 3, seconds, rate))
        assert not np.array_equal(clip, render(name, 4, seconds, rate))


def test_unknown_class() -> None:
    with pytest.raises(ValueError, match="no class 'bark'"):
        render("bark", 0, 1.0, RATE)


def test_a_written_set_is_found_with_its_classes_and_folds(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", clips_per_class=10, seconds=0.1, seed=1)
    found = scan(tmp_path / "a")
    assert found.classes == tuple(sorted(CLASSES))
    assert not found.bad
    for fold in range(1, 6):
        clips = [clip for clip in found.clips if clip.fold == fold]
        assert sorted(clip.labels[0] for clip in clips) == sorted(CLASSES * 2)
    assert {(clip.num_samples, clip.sample_rate, clip.channels) for clip in found.clips} == {(1600, RATE, 1)}


def test_a_set_depends_on_its_seed_alone(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dataset(tmp_path / folder, clips_per_class=2, seconds=0.1, seed=seed)
    files = [file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.wav")]
    assert len(files) == 2 * len(CLASSES)
    for file in files:
        first, same, other = (soundfile.read(tmp_path / folder / file)[0] for folder in "abc")
        np.testing.assert_array_equal(first, same)
        assert not np.array_equal(first, other)
