from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ESC10, needs_esc10

from ssl_c2f.data import decode
from ssl_c2f.data.decode import AudioError, Header, read_audio, read_header, resampled_length

RATE = 16000


def noise(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise whose loudness wanders, so that no two places look alike."""
    samples = np.random.default_rng(seed).standard_normal((round(seconds * rate), channels)) * 0.1
    return (samples * (0.2 + np.sin(np.arange(len(samples)) * 7 / rate)[:, None] ** 2)).astype(np.float32)


def tone(seconds: float, rate: int, hertz: float | np.ndarray) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(file: Path, samples: np.ndarray, rate: int, **options: str) -> Path:
    """In blocks: libsndfile overflows its stack on a long Vorbis write."""
    with soundfile.SoundFile(file, "w", rate, samples.shape[1] if samples.ndim == 2 else 1, **options) as target:
        for block in range(0, len(samples), 2**14):
            target.write(samples[block : block + 2**14])
    return file


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every container and codec, some long enough that cuts have to seek; 44.1 and 48 kHz, 96 kHz and an odd rate."""
    folder = tmp_path_factory.mktemp("recordings")
    quiet = noise(30, 48000)
    quiet[10 * 48000 : 20 * 48000] = 0  # makes MP3 save up bits that the next frames use
    sweep = tone(4, 44100, 200 + 200 * np.arange(4 * 44100) / 44100)  # few bits, so long Ogg pages
    return [
        write(folder / "mono.wav", noise(3, 44100), 44100),
        write(folder / "eight.wav", noise(2, 96000, 8), 96000),
        write(folder / "odd.wav", noise(2, 44101), 44101),
        write(folder / "low.wav", noise(3, 8000), 8000),
        write(folder / "same.flac", noise(3, RATE), RATE),
        write(folder / "short.ogg", sweep, 44100),
        write(folder / "long.ogg", quiet, 48000),
        write(folder / "opus.ogg", noise(15, 48000), 48000, subtype="OPUS"),
        write(folder / "long.mp3", quiet, 48000),
    ]


@pytest.fixture(scope="module")
def wholes(recordings: list[Path]) -> dict[Path, torch.Tensor]:
    return {file: read_audio(file, RATE) for file in recordings}


@settings(max_examples=100, deadline=None)
@given(file=st.integers(0, 8), where=st.floats(0, 1, exclude_max=True), num=st.integers(1, 30000))
def test_a_cut_equals_the_slice_of_the_whole(
    recordings: list[Path], wholes: dict[Path, torch.Tensor], file: int, where: float, num: int
) -> None:
    whole = wholes[recordings[file]]
    start = int(where * len(whole))
    cut = read_audio(recordings[file], RATE, start, num)
    torch.testing.assert_close(cut, whole[start : start + num], rtol=0, atol=1e-4)


def test_cuts_around_what_decoders_get_wrong(recordings: list[Path], wholes: dict[Path, torch.Tensor]) -> None:
    """The last page of an Ogg file, and sound after silence in MP3: there a plain seek gives other samples."""
    for file, seconds in ((recordings[5], 3.8), (recordings[6], 29.8), (recordings[8], 20.0)):
        for start in range(int((seconds - 0.1) * RATE), int((seconds + 0.1) * RATE), 400):
            torch.testing.assert_close(
                read_audio(file, RATE, start, 500), wholes[file][start : start + 500], rtol=0, atol=1e-4
            )


@given(st.integers(1, 10**6), st.integers(4000, 400_000), st.integers(4000, 96000))
def test_resampled_length_is_within_a_sample_of_the_duration(num: int, rate: int, target: int) -> None:
    assert abs(resampled_length(num, rate, target) - num * target / rate) <= 1 + 5e-4 * num * target / rate


def test_whole_files_have_the_promised_length(wholes: dict[Path, torch.Tensor]) -> None:
    for file, whole in wholes.items():
        num, rate, _ = read_header(file)
        assert len(whole) == resampled_length(num, rate, RATE)
        assert whole.dtype == torch.float32


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 44101, 48000, 96000, 250_000])
def test_resampling_keeps_pitch_and_loudness(tmp_path: Path, rate: int) -> None:
    file = write(tmp_path / "a.wav", tone(1, rate, 440), rate)
    inner = slice(2000, 14000)  # away from the edges of the filter
    expected = torch.from_numpy(tone(1, RATE, 440))[inner]
    torch.testing.assert_close(read_audio(file, RATE)[:RATE][inner], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format(tmp_path: Path, subtype: str) -> None:
    samples = tone(0.5, RATE, 300)
    file = write(tmp_path / "a.wav", samples, RATE, subtype=subtype)
    torch.testing.assert_close(read_audio(file, RATE), torch.from_numpy(samples), rtol=0, atol=1 / 120)


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    samples = noise(0.5, 96000, channels)
    file = write(tmp_path / "several.wav", samples, 96000, subtype="FLOAT")
    assert read_header(file) == Header(48000, 96000, channels)
    expected = torch.from_numpy(samples.mean(axis=1))
    torch.testing.assert_close(read_audio(file, 96000), expected, rtol=0, atol=0 if channels < 8 else 1e-6)


def test_a_clip_of_30_ms(tmp_path: Path) -> None:
    file = write(tmp_path / "a.wav", noise(0.03, 44100), 44100)
    assert read_audio(file, RATE).shape == (480,)
    assert read_audio(file, RATE, 400, 1000).shape == (80,)


def test_a_cut_of_a_two_hour_file_decodes_only_its_surroundings(tmp_path: Path) -> None:
    rate, minute = 8000, np.zeros(60 * 8000, np.float32)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", rate, 1) as file:
        for _ in range(118):
            file.write(minute)
        file.write(tone(60, rate, 500))
        file.write(minute)
    tracemalloc.start()
    cut = read_audio(tmp_path / "long.flac", RATE, start=118 * 60 * RATE, num=10 * RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # decoded whole it is 230 MB
    torch.testing.assert_close(cut[100:], torch.from_numpy(tone(10, RATE, 500))[100:], rtol=0, atol=0.01)


def test_bad_files_say_why(tmp_path: Path) -> None:
    def reason(name: str, start: int = 0) -> str:
        with pytest.raises(AudioError) as caught:
            read_audio(tmp_path / name, RATE, start)
        assert caught.value.place == tmp_path / name
        assert str(caught.value) == f"{tmp_path / name}: {caught.value.reason}"
        return caught.value.reason

    samples = noise(4, 44100)
    for name in ("text.wav", "text.mp3", "text.ogg", "text.flac"):
        (tmp_path / name).write_text("not audio\n" * 100)
        assert reason(name) == "damaged, or not audio"
    (tmp_path / "empty.wav").touch()
    assert reason("empty.wav") == "damaged, or not audio"
    (tmp_path / "folder.wav").mkdir()
    assert reason("folder.wav") == "not a file"
    assert reason("missing.wav") == reason("lone surrogate \ud800.wav") == reason("null \0.wav") == "no such file"
    os.mkfifo(tmp_path / "pipe.wav")  # to open it would wait for a writer
    assert reason("pipe.wav") == "not a file"
    write(tmp_path / "none.wav", samples[:0], RATE)
    assert reason("none.wav") == "no samples"
    for name, expected in (("cut.ogg", "truncated"), ("cut.mp3", "truncated"), ("cut.flac", "damaged, or not audio")):
        data = write(tmp_path / name, samples, 44100).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 3 // 4])
        assert reason(name) == expected
    for value in (np.nan, np.inf):
        samples[100] = value
        write(tmp_path / "nan.wav", samples, 44100, subtype="FLOAT")
        assert reason("nan.wav") == "NaN or infinite samples"
    write(tmp_path / "short.wav", tone(1, RATE, 300), RATE)
    assert reason("short.wav", start=RATE) == f"ends before sample {RATE}"


@pytest.mark.parametrize("kept", [0.999, 0.95, 0.5, 0.15])
def test_truncated_ogg_is_found_without_decoding(tmp_path: Path, kept: float) -> None:
    file = write(tmp_path / "a.ogg", noise(4, 44100), 44100)
    read_header(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(AudioError, match="truncated"):
        read_header(file)


@needs_esc10
def test_real_clips_are_five_seconds_of_sound() -> None:
    files = sorted(ESC10.glob("*/*.ogg"))[::40]
    for file in files:
        whole = read_audio(file, RATE)
        assert abs(len(whole) - 5 * RATE) < RATE // 20
        assert 0 < whole.abs().max() < 1.5
        torch.testing.assert_close(read_audio(file, RATE, 70000, 2000), whole[70000:72000], rtol=0, atol=1e-4)


def flac_of_length(file: Path, samples: np.ndarray, said: int) -> Path:
    """A FLAC file whose header says another length than it has: 0 is legal, and means that it is not known."""
    soundfile.write(file, samples, 44100)
    data = bytearray(file.read_bytes())
    data[21] = data[21] & 0xF0 | said >> 32
    data[22:26] = (said & 0xFFFFFFFF).to_bytes(4, "big")
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("said", [0, 2**36 - 1])
def test_a_length_that_cannot_be_is_measured(tmp_path: Path, said: int) -> None:
    samples = noise(1, 100_001)[:, 0]
    true = flac_of_length(tmp_path / "true.flac", samples, len(samples))
    odd = flac_of_length(tmp_path / "odd.flac", samples, said)
    assert read_header(odd) == read_header(true) == (100_001, 44100, 1)
    for start, num in ((0, None), (0, 1000), (20_000, 5000), (36_000, 1000), (36_200, None)):
        assert torch.equal(read_audio(odd, RATE, start, num), read_audio(true, RATE, start, num))
    with pytest.raises(AudioError):
        read_audio(odd, RATE, 40_000)


def test_a_length_that_is_too_large_is_no_allocation(tmp_path: Path) -> None:
    said = 10**7  # 40 MB; the file could hold it, if it were silent
    lying = flac_of_length(tmp_path / "lying.flac", noise(1, 5000)[:, 0], said)
    assert read_header(lying).num_samples == said
    with pytest.raises(AudioError, match=r"damaged|truncated"):
        read_audio(lying, RATE)


@pytest.mark.parametrize("rate", [1, 6, 999, 768_001, 10**9])
def test_rates_that_no_recording_has(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, 100), rate)
    with pytest.raises(AudioError, match=f"a sample rate of {rate} Hz"):
        read_header(tmp_path / "a.wav")


def test_odd_high_rates_take_a_filter_of_moderate_size(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, 767_999), 767_999)
    assert abs(len(read_audio(tmp_path / "a.wav", 8000)) - 8000) <= 4


def test_more_channels_than_a_recording_has(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.ones((100, 64)) / 9, 8000)
    soundfile.write(tmp_path / "b.wav", np.ones((100, 65)) / 9, 8000)
    assert len(read_audio(tmp_path / "a.wav", 8000)) == 100
    with pytest.raises(AudioError, match="65 channels"):
        read_header(tmp_path / "b.wav")


def test_samples_beyond_any_scale(tmp_path: Path) -> None:
    for peak, good in ((40.0, True), (2.0**31, True), (1e10, False), (-1e20, False)):
        samples = np.zeros(1000)
        samples[500] = peak
        soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
        if good:
            assert read_audio(tmp_path / "a.wav", 8000).abs().max() == abs(peak)
            continue
        with pytest.raises(AudioError, match="samples as large as"):
            read_audio(tmp_path / "a.wav", 8000)


def test_a_disk_that_does_not_answer_costs_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def hang(path: Path, flags: int) -> int:
        if Path(path).name == "gone.wav":
            threading.Event().wait()
        return really_open(path, flags)

    monkeypatch.setattr(os, "open", hang)
    monkeypatch.setattr(decode, "_PATIENCE", 0.1)
    for read in (lambda: read_header(tmp_path / "gone.wav"), lambda: read_audio(tmp_path / "gone.wav", RATE)):
        with pytest.raises(AudioError, match=r"gone\.wav: no answer from the disk within 0\.1 s"):
            read()
    monkeypatch.setattr(decode, "_PATIENCE", 120)
    assert len(read_audio(write(tmp_path / "a.wav", noise(1, 100), 8000), 8000)) == 100
