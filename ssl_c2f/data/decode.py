"""Audio files -> mono waveforms at one sample rate, read whole or cut out by seeking.

S: samples of audio.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from soundfile import SoundFile, SoundFileError
from torch import Tensor
from torchaudio.transforms import Resample

# Lossy decoders need what came before: MP3 borrows bits from earlier frames, Vorbis and Opus overlap theirs.
_WARM_UP = 2**14
# libsndfile 1.2 lands in the wrong place when it seeks into the last page of an Ogg file, whose length may differ from
# what its packets hold. A page has at most 255 packets of at most 4096 samples.
_LAST_OGG_PAGE = 2**20
# An Ogg header holds no length: only libsndfile's log tells that the end is missing, or stops within the last page.
_TRUNCATED_OGG = ("Last page lacks an end-of-stream bit", "Junk after the last page")


class AudioError(Exception):
    """A file that cannot be used as audio: `path`, and the `reason` in a few words."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


class Header(NamedTuple):
    """What a file says about itself; `num_samples` counts at its own rate."""

    num_samples: int
    sample_rate: int
    channels: int


def read_header(path: Path | str) -> Header:
    """Length, rate and channels of a file without decoding it.

    Raises:
        AudioError: not there, not audio, truncated as far as its header shows, or without samples.
    """
    with _open(path) as file:
        return Header(file.frames, file.samplerate, file.channels)


def read_audio(path: Path | str, sample_rate: int, start: int = 0, num: int | None = None) -> Tensor:
    """Decode a file, or `num` samples of it from `start` on, to mono at `sample_rate`: (S,) float32.

    `start` and `num` count samples at `sample_rate`; channels are averaged. A cut decodes little more than it returns,
    equals the same slice of the whole file, and is shorter than `num` only where the file ends.

    A WAV file that ends before its header says is read to its end, as recorders that lost power leave such files; any
    other truncated file is an error.

    Raises:
        AudioError: as `read_header`; also damaged, NaN or infinite samples, or nothing left at `start`.
    """
    with _open(path) as file:
        down, up = _ratio(file.samplerate, sample_rate)
        if start >= resampled_length(file.frames, file.samplerate, sample_rate):
            raise AudioError(path, f"ends before sample {start}")
        # Cut at multiples of `down`, where input and output samples coincide, with room for the resampling filter.
        margin = math.ceil(8 * max(1.0, down / up) / down)
        first = max(0, start // up - margin)
        end = file.frames if num is None else (math.ceil((start + num) / up) + margin) * down
        waveform = _decode(file, first * down, min(end, file.frames))
    if not waveform.isfinite().all():
        raise AudioError(path, "NaN or infinite samples")
    if down != up:
        waveform = _resampler(down, up)(waveform)
    return waveform[start - first * up :][:num]


def resampled_length(num_samples: int, rate: int, sample_rate: int) -> int:
    """How many samples `read_audio` makes at `sample_rate` of `num_samples` at a file's own `rate`."""
    down, up = _ratio(rate, sample_rate)
    return -(-num_samples * up // down)


@contextmanager
def _open(path: Path | str) -> Iterator[SoundFile]:
    """A file with samples in it; whatever the decoder raises inside becomes an AudioError."""
    try:
        with SoundFile(path) as file:
            if any(sign in file.extra_info for sign in _TRUNCATED_OGG):
                raise AudioError(path, "truncated")
            if not file.frames:
                raise AudioError(path, "no samples")
            yield file
    except SoundFileError:
        raise AudioError(path, "damaged, or not audio" if Path(path).is_file() else "no such file") from None


def _decode(file: SoundFile, start: int, end: int) -> Tensor:
    """Samples start to end at the file's own rate, channels averaged: (end - start,)."""
    origin = start - _WARM_UP
    if file.format == "OGG":
        origin = min(origin, file.frames - _LAST_OGG_PAGE)
    origin = max(0, origin)
    if origin:
        file.seek(origin)
    samples = file.read(end - origin, dtype="float32", always_2d=True)
    if len(samples) < end - origin:
        raise AudioError(file.name, "truncated")
    return torch.from_numpy(samples[start - origin :].mean(axis=1))


def _ratio(rate: int, sample_rate: int) -> tuple[int, int]:
    """Every `down` samples in give `up` out.

    The filter bank has about up x down taps: odd pairs (44,101 Hz to 16 kHz) take a fraction within 0.04 % of theirs.
    """
    return Fraction(rate, sample_rate).limit_denominator(1280).as_integer_ratio()  # exact for all common pairs


@lru_cache(maxsize=32)
def _resampler(down: int, up: int) -> Resample:
    return Resample(down, up)  # computes its kernel once, unlike torchaudio.functional.resample
