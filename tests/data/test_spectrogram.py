"""The filterbank equals Kaldi's, and tones and clicks appear at the right place in it."""

from __future__ import annotations

import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ESC10, needs_esc10
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks

from ssl_c2f.data.spectrogram import Fbank

RATE, HOP, WINDOW, MELS = 16000, 160, 400, 128


def fbank(hop: int = HOP, window: int = WINDOW, mels: int = MELS) -> Fbank:
    return Fbank(RATE, hop, window, mels, 20.0, RATE / 2)


def kaldi(waveform: Tensor, rate: float = RATE, **changes: float) -> Tensor:
    """(1, S) -> (T, F)"""
    options = {"num_mel_bins": MELS, "sample_frequency": rate, "dither": 0.0} | changes
    spec: Tensor = torchaudio.compliance.kaldi.fbank(
        waveform, htk_compat=True, use_energy=False, window_type="hanning", **options
    )
    return spec


def sounds() -> dict[str, Tensor]:
    """One second each, near the floor too, where fp32 is least forgiving."""
    time = torch.arange(RATE) / RATE
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    return {
        "noise": noise,
        "faint noise": 1e-5 * noise,
        "chirp": torch.sin(2 * torch.pi * (100 + 3500 * time) * time),
        "click": (torch.arange(RATE) == RATE // 2).float(),
        "offset": torch.full((RATE,), 0.3),
        "silence": torch.zeros(RATE),
    }


def test_equals_kaldi_on_a_batch_of_synthetic_sounds() -> None:
    waveforms = sounds()
    for name, ours in zip(waveforms, fbank()(torch.stack(list(waveforms.values()))), strict=True):
        difference = (ours - kaldi(waveforms[name][None])).abs().max()
        assert difference <= 1e-5, name


@pytest.mark.parametrize(
    ("rate", "hop_ms", "window_ms", "mels", "low", "high"),
    [
        (16000, 10, 25, 64, 50, 8000),
        (16000, 40, 100, 128, 20, 8000),
        (44100, 10, 25, 128, 0, 16000),
        (384000, 1, 2, 80, 10000, 150000),
    ],
)
def test_equals_kaldi_at_other_settings(
    rate: int, hop_ms: int, window_ms: int, mels: int, low: float, high: float
) -> None:
    waveform = sounds()["noise"][None]
    ours = Fbank(rate, rate * hop_ms // 1000, rate * window_ms // 1000, mels, low, high)(waveform)
    theirs = kaldi(
        waveform, rate, num_mel_bins=mels, frame_shift=hop_ms, frame_length=window_ms, low_freq=low, high_freq=high
    )
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-5)


@needs_esc10
def test_equals_kaldi_on_real_recordings() -> None:
    for folder in sorted(path for path in ESC10.iterdir() if path.is_dir()):
        samples, rate = soundfile.read(sorted(folder.glob("*.ogg"))[0], dtype="float32")
        waveform = torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE)[None]
        torch.testing.assert_close(fbank()(waveform)[0], kaldi(waveform), rtol=0, atol=1e-5)


def test_a_clip_is_the_same_in_any_batch() -> None:
    waveforms = torch.stack(list(sounds().values()))
    for waveform, spec in zip(waveforms, fbank()(waveforms), strict=True):
        assert torch.equal(fbank()(waveform[None])[0], spec) and torch.equal(fbank()(waveform), spec)


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(WINDOW, 4 * WINDOW), factor=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_longer_hop_gives_every_cth_frame(samples: int, factor: int, seed: int) -> None:
    waveform = torch.randn(2, samples, generator=torch.Generator().manual_seed(seed))
    fine, coarse = fbank()(waveform), fbank(HOP * factor)(waveform)
    assert coarse.shape == (2, 1 + (samples - WINDOW) // (HOP * factor), MELS)
    torch.testing.assert_close(coarse, fine[:, ::factor], rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [20, 64, 100, 127])
def test_a_tone_lands_in_its_mel_row(row: int) -> None:
    _, centres = get_mel_banks(MELS, 512, RATE, 20.0, RATE / 2, 100.0, -500.0, 1.0)
    tone = torch.sin(2 * torch.pi * centres[row] * torch.arange(RATE) / RATE)
    assert fbank()(tone[None]).mean(1).argmax().item() == pytest.approx(row, abs=1)  # an FFT bin is as wide as a filter


@pytest.mark.parametrize("sample", [500, 4000, 12345])
def test_a_click_lands_in_the_frames_that_cover_it(sample: int) -> None:
    spec = fbank()((torch.arange(RATE) == sample).float()[None])[0]
    starts = torch.arange(len(spec)) * HOP
    heard = (spec > spec.min()).any(1)
    assert torch.equal(heard, (starts <= sample) & (sample < starts + WINDOW))


def test_stays_in_float32() -> None:
    waveform = sounds()["noise"][None]
    model = fbank()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(waveform), model(waveform.double()))
        assert model(waveform).dtype == torch.float32
    assert not model.state_dict()


def test_refuses_less_than_a_window() -> None:
    assert fbank()(torch.zeros(1, WINDOW)).shape == (1, 1, MELS)
    with pytest.raises(ValueError, match="399 samples are shorter than one window of 400"):
        fbank()(torch.zeros(1, WINDOW - 1))
