"""Memory used by spectrograms that are cached, while they are computed and afterwards."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssl_c2f.curriculum.geometry import AudioOptions, Geometry, make_geometry
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.recordings import DataOptions

RATE = 8000
AUDIO = AudioOptions(sample_rate=RATE, num_mels=16, clip_seconds=0.5)


def geometry(factor: int) -> Geometry:
    return make_geometry(AUDIO, "frame_shift", (8, 4), factor)


def corpus(root: Path, **options: float) -> Corpus:
    return Corpus.open(DataOptions.model_validate({"root": str(root), **options}), 0)


def test_long_recordings_are_never_in_memory_whole(tmp_path: Path) -> None:
    rate, channels, seconds = 48_000, 8, 200
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, channels, "PCM_16") as file:
        for _ in range(seconds):
            file.write(np.random.default_rng(0).integers(-9999, 9999, (rate, channels), np.int16))
    found = corpus(tmp_path)
    tracemalloc.start()  # of NumPy, into whose arrays files are decoded
    found.source(geometry(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(found.source(geometry(1)).cache) == [0]
    assert peak < 100e6 < 4 * rate * channels * seconds


@pytest.mark.parametrize("room_for", [1, 2])
def test_all_geometries_together_keep_to_the_limit(tmp_path: Path, room_for: int) -> None:
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).standard_normal(5 * RATE), RATE)
    frames = [2 * geometry(factor).raw_frames(5 * RATE) for factor in (1, 2)]
    found = corpus(tmp_path, cache_gb=1.01 * sum(frames[:room_for]) * AUDIO.num_mels * 4 / 1e9)
    kept = [sum(map(len, found.source(geometry(factor)).cache.values())) for factor in (1, 2)]
    assert kept == [frames[0], frames[1] if room_for == 2 else 0]
