"""Silent, clipped, cancelled, odd and duplicate recordings are found, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssl_c2f.data import manifest
from ssl_c2f.data.decode import AudioError
from ssl_c2f.data.manifest import scan
from ssl_c2f.data.quality import examine
from ssl_c2f.tasks.data import DataCommandOptions, check

RATE = 8000


def test_recordings_that_deserve_a_look_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * RATE)
    for name, wave, rate in (
        ("good", noise[:RATE], RATE), ("loud", noise[:RATE].clip(-0.3, 0.3) / 0.31, RATE), ("silent", 0 * noise, RATE),
        ("clipped", (20 * noise).clip(-1, 1), RATE), ("odd", noise[::-1], 11025), ("cancels", [noise, -noise], RATE),
        ("stereo", [noise, noise[::-1]], RATE), ("again", noise[:RATE], RATE),
    ):
        soundfile.write(tmp_path / f"{name}.wav", np.atleast_2d(wave).T, rate)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (tmp_path / "notes.txt").write_text("none")
    assert check(DataCommandOptions.model_validate({"data": {"root": str(tmp_path)}})) == 1
    assert capsys.readouterr().out.splitlines() == [
        "not read: 1 .txt",
        "1 silent: silent.wav",
        "1 clipped: clipped.wav",
        "1 with channels that cancel each other (data.channel=left reads one): cancels.wav",
        "1 not at 8000 Hz as most: odd.wav (11025 Hz)",
        "1 the same as another: good.wav (as again.wav)",
        "broken.wav: damaged, or not audio",
        "8 good, 1 bad",
    ]


def test_what_is_not_read_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.WAV", np.zeros(100), RATE)
    for name in ("b.m4a", "c.M4A", "d.wma", "e.txt"):
        (tmp_path / name).write_bytes(b"?")
    monkeypatch.setattr(manifest, "endings", lambda: frozenset({".wav"}))
    assert scan(tmp_path).notes == (
        "not read: 2 .m4a, 1 .wma, 1 .txt (pip install 'ssl_c2f[formats]' reads .m4a, .wma)",
    )


def test_samples_that_are_no_numbers_are_bad(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(10, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        examine(tmp_path / "a.wav")
