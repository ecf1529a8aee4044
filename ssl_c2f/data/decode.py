"""Audio files -> mono waveforms at one sample rate, read whole or cut out by seeking.

S: samples of audio.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Member:
    """An audio file inside a shard: `size` bytes of the file `shard` from `offset` on."""

    shard: Path
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard} at byte {self.offset}"


Place = Path | str | Member  # where an audio file is


class AudioError(Exception):
    """A file that cannot be used as audio: where it is, and the `reason` in a few words."""

    def __init__(self, place: Place, reason: str) -> None:
        super().__init__(place, reason)
        self.place, self.reason = place, reason

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Header(NamedTuple):
    """What a file says about itself; `num_samples` counts at its own rate."""

    num_samples: int
    sample_rate: int
    channels: int


def read_header(place: Place) -> Header:
    """Length, rate and channels of a file without decoding it.

    Raises:
        AudioError: not there, not audio, truncated as far as its header shows, or without samples.
    """
    with _open(place) as file:
        return Header(file.frames, file.samplerate, file.channels)


def read_audio(place: Place, sample_rate: int, start: int = 0, num: int | None = None) -> Tensor:
    """Decode a file, or `num` samples of it from `start` on, to mono at `sample_rate`: (S,) float32.

    `start` and `num` count samples at `sample_rate`; channels are averaged. A cut decodes little more than it returns,
    equals the same slice of the whole file, and is shorter than `num` only where the file ends.

    A WAV file that ends before its header says is read to its end, as recorders that lost power leave such files; any
    other truncated file is an error.

    Raises:
        AudioError: as `read_header`; also damaged, NaN or infinite samples, or nothing left at `start`.
    """
    with _open(place) as file:
        down, up = _ratio(file.samplerate, sample_rate)
        if start >= resampled_length(file.frames, file.samplerate, sample_rate):
            raise AudioError(place, f"ends before sample {start}")
        # Cut at multiples of `down`, where input and output samples coincide, with room for the resampling filter.
        margin = math.ceil(8 * max(1.0, down / up) / down)
        first = max(0, start // up - margin)
        end = file.frames if num is None else (math.ceil((start + num) / up) + margin) * down
        waveform = _decode(file, first * down, min(end, file.frames))
    if not waveform.isfinite().all():
        raise AudioError(place, "NaN or infinite samples")
    if down != up:
        waveform = _resampler(down, up)(waveform)
    return waveform[start - first * up :][:num]


def resampled_length(num_samples: int, rate: int, sample_rate: int) -> int:
    """How many samples `read_audio` makes at `sample_rate` of `num_samples` at a file's own `rate`."""
    down, up = _ratio(rate, sample_rate)
    return -(-num_samples * up // down)


@contextmanager
def _open(place: Place) -> Iterator[SoundFile]:
    """A file with samples in it; whatever the decoder raises inside becomes an AudioError."""
    try:
        with ExitStack() as opened:
            # as bytes: names that are not UTF-8 are refused otherwise
            where = opened.enter_context(_Window(place)) if isinstance(place, Member) else os.fsencode(place)
            file = opened.enter_context(SoundFile(where))
            if any(sign in file.extra_info for sign in _TRUNCATED_OGG):
                raise AudioError(place, "truncated")
            if not file.frames:
                raise AudioError(place, "no samples")
            yield file
    except EOFError:
        raise AudioError(place, "truncated") from None
    except (SoundFileError, OSError):
        there = Path(place.shard if isinstance(place, Member) else place).is_file()
        raise AudioError(place, "damaged, or not audio" if there else "no such file") from None


class _Window(io.RawIOBase):
    """A member of a shard as a file of its own, which libsndfile reads and seeks in."""

    def __init__(self, member: Member) -> None:
        self._file, self._first, self._size, self._at = member.shard.open("rb"), member.offset, member.size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._first + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(self._size - self._at, 0)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


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
        raise EOFError
    return torch.from_numpy(samples[start - origin :].mean(axis=1))


def _ratio(rate: int, sample_rate: int) -> tuple[int, int]:
    """Every `down` samples in give `up` out.

    The filter bank has about up x down taps: odd pairs (44,101 Hz to 16 kHz) take a fraction within 0.04 % of theirs.
    """
    return Fraction(rate, sample_rate).limit_denominator(1280).as_integer_ratio()  # exact for all common pairs


@lru_cache(maxsize=32)
def _resampler(down: int, up: int) -> Resample:
    return Resample(down, up)  # computes its kernel once, unlike torchaudio.functional.resample
