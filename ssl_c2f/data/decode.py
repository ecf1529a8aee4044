"""Audio files -> mono waveforms at one sample rate, read whole or cut out by seeking.

S: samples of audio.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from soundfile import SoundFile, SoundFileError
from torch import Tensor
from torchaudio.transforms import Resample

from ssl_c2f.core.threads import sign_of_life, within
from ssl_c2f.data.containers import INSTALL, Endless, Foreign, has_av, has_no_length, is_foreign

T = TypeVar("T")
Channel = Literal["mean", "left", "right", "loudest"]

# Lossy decoders need what came before: MP3 borrows bits from earlier frames, Vorbis and Opus overlap theirs.
_WARM_UP = 2**14
_EXACT = ("PCM_", "FLOAT", "DOUBLE")  # WAV and FLAC need nothing before: how libsndfile names samples that stand alone
# libsndfile 1.2 lands in the wrong place when it seeks into the last page of an Ogg file, whose length may differ from
# what its packets hold. A page has at most 255 packets of at most 4096 samples.
_LAST_OGG_PAGE = 2**20
# An Ogg header holds no length: only libsndfile's log tells that the end is missing, or stops within the last page.
# What a header says is believed only where the file can hold it: no codec here packs more samples into a byte (FLAC: 14
# bytes for 65,535 equal ones), and no allocation follows a header's word.
_MOST_PER_BYTE = 5000
_PATIENCE = 120.0  # seconds that a disk may take for a block
_BLOCK = 2**20  # samples of all channels that are decoded at a time
RATES = (1000, 768_000)  # Hz that are audio; far below and beyond, the resampling filter is all there is
MOST_CHANNELS = 64
_MOST_TAPS = 6 * 1280**2  # of a resampling filter: 40 MB
_LOUDEST = 2.0**31  # full scale of samples that were written as whole numbers; log-mel values of fp32 end at 1e16
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
    """Length, rate and channels of a file, without decoding it if its header says a length that can be.

    Raises:
        AudioError: not there, not audio, truncated as far as its header shows, without samples, or of a rate or a
            number of channels that no recording has.
    """
    def read() -> Header:
        with _open(place) as (file, length):
            if length is None:
                length = sum(map(len, _blocks(file, None)))
            if not length:
                raise AudioError(place, "no samples")
            return Header(length, file.samplerate, file.channels)

    return answered(place, read)


def can_be(place: Place, said: Header) -> bool:
    """Whether a file can be what somebody says of it, without opening it. Raises AudioError: it is not there."""
    try:
        found = os.stat(place.shard if isinstance(place, Member) else place)
    except (OSError, ValueError):
        raise AudioError(place, "no such file") from None
    possible = 0 < said.num_samples <= _MOST_PER_BYTE * _size(place, found)
    return possible and RATES[0] <= said.sample_rate <= RATES[1] and 0 < said.channels <= MOST_CHANNELS


def read_audio(
    place: Place, sample_rate: int, start: int = 0, num: int | None = None, channel: Channel = "mean"
) -> Tensor:
    """Decode a file, or `num` samples of it from `start` on, to mono at `sample_rate`: (S,) float32.

    `start` and `num` count samples at `sample_rate`. A cut decodes little more than it returns, equals the same slice
    of the whole file, and is shorter than `num` only where the file ends. Channels are averaged, or one of them is
    taken: `right` is the second if there are two, `loudest` the one with most power in the cut.

    A WAV file that ends before its header says is read to its end, as recorders that lost power leave such files; any
    other truncated file is an error.

    Raises:
        AudioError: as `read_header`; also damaged, samples that are NaN, infinite or far too large, or nothing left at
            `start`.
    """
    def read() -> tuple[Tensor, int, int, int]:
        with _open(place) as (file, length):
            down, up = _ratio(file.samplerate, sample_rate)
            # Cut at multiples of `down`, where input and output samples coincide, with room for the resampling filter.
            margin = math.ceil(8 * max(1.0, down / up) / down)
            first = max(0, start // up - margin)
            end = None if num is None else (math.ceil((start + num) / up) + margin) * down
            if length is not None:
                end = length if end is None else min(end, length)
            if end is not None and first * down >= end:
                raise AudioError(place, f"ends before sample {start}")
            return _decode(file, first * down, end, length, channel), down, up, start - first * up

    waveform, down, up, skip = answered(place, read)
    if not len(waveform):  # the end of a file that did not say where it is
        raise AudioError(place, f"ends before sample {start}")
    if not np.isfinite(waveform.numpy()).all():  # 20 times as fast as torch's
        raise AudioError(place, "NaN or infinite samples")
    if waveform.abs().max() > _LOUDEST:
        raise AudioError(place, f"samples as large as {waveform.abs().max():.3g}")
    if down != up:
        waveform = _resampler(down, up)(waveform)
    waveform = waveform[skip:][:num]
    if not len(waveform):
        raise AudioError(place, f"ends before sample {start}")
    return waveform


def read_blocks(place: Place) -> Iterator[np.ndarray]:
    """A whole file at its own rate, block by block: (n, channels) float32. Raises AudioError as `read_audio`."""
    with _open(place) as (file, length):
        done = 0
        for block in _blocks(file, length):
            if not np.isfinite(block).all():
                raise AudioError(place, "NaN or infinite samples")
            if (largest := np.abs(block).max()) > _LOUDEST:
                raise AudioError(place, f"samples as large as {largest:.3g}")
            yield block
            done += len(block)
        if done < (length or 1):
            raise AudioError(place, "truncated" if length else "no samples")


def answered(place: Place, read: Callable[[], T]) -> T:
    """What `read` returns or raises. A disk that does not answer costs a file, and keeps nobody from ending."""
    try:
        return within(_PATIENCE, read)
    except TimeoutError:
        raise AudioError(place, f"no answer from the disk within {_PATIENCE:g} s") from None


def resampled_length(num_samples: int, rate: int, sample_rate: int) -> int:
    """How many samples `read_audio` makes at `sample_rate` of `num_samples` at a file's own `rate`."""
    down, up = _ratio(rate, sample_rate)
    return -(-num_samples * up // down)


class _Stream(SoundFile):  # type: ignore[misc]
    """SoundFile that reads on without asking where it is. After each block it would go to the place where it is
    already, which libsndfile cannot do at the end of a FLAC file of unknown length."""

    def seekable(self) -> bool:
        return False


@contextmanager
def _open(place: Place) -> Iterator[tuple[_Stream | Foreign, int | None]]:
    """A file, and how many samples it says to have: None where it does not say, or cannot have so many.

    Whatever the decoder raises inside becomes an AudioError.
    """
    with ExitStack() as opened:
        # By a descriptor: the name need not be UTF-8, and SoundFile opens one file at a time, so none may block there.
        descriptor = _descriptor(place)
        opened.callback(os.close, descriptor)
        size = _size(place, os.fstat(descriptor))
        try:
            file, length = _decoder(place, descriptor, size)
            opened.enter_context(file)
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise AudioError(place, f"a sample rate of {file.samplerate} Hz")
            if file.channels > MOST_CHANNELS:
                raise AudioError(place, f"{file.channels} channels")
            yield file, length
        except EOFError:
            raise AudioError(place, "truncated") from None
        except (SoundFileError, OSError):
            raise AudioError(place, "damaged, or not audio") from None


def _decoder(place: Place, descriptor: int, size: int) -> tuple[_Stream | Foreign, int | None]:
    """What decodes an open file of so many bytes, and the file's length where that can be believed."""
    stream: Any = io.FileIO(descriptor, closefd=False)
    if isinstance(place, Member):
        stream = _Window(descriptor, place)
    if is_foreign(stream):
        if not has_av():
            raise AudioError(place, f"of a format that needs {INSTALL}")
        stream.seek(0)
        return Foreign(stream), None
    endless = has_no_length(stream)
    stream.seek(0)
    # libsndfile reads a plain file faster by its descriptor
    where = Endless(stream) if endless else stream if isinstance(place, Member) else descriptor
    file = _Stream(where, closefd=False)
    if any(sign in file.extra_info for sign in _TRUNCATED_OGG):
        raise AudioError(place, "truncated")
    if file.frames <= 0 and not endless:
        raise AudioError(place, "no samples" if size < 2 * _WARM_UP else "no samples, as its header says")
    return file, None if endless or file.frames > _MOST_PER_BYTE * size else file.frames


def _descriptor(place: Place) -> int:
    try:
        # without O_NONBLOCK a named pipe would wait for somebody to write to it
        descriptor = os.open(place.shard if isinstance(place, Member) else place, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        raise AudioError(place, "permission denied") from None
    except (OSError, ValueError):  # ValueError: no name that a file can have
        raise AudioError(place, "no such file") from None
    with suppress(OSError):  # the disk answers, before anybody waits for this one with a lock
        os.pread(descriptor, 1, 0)
    return descriptor


def _size(place: Place, found: os.stat_result) -> int:
    """Bytes of the recording. Raises AudioError: this is no file, or ends within the recording."""
    if not stat.S_ISREG(found.st_mode):
        raise AudioError(place, "not a file")
    if not isinstance(place, Member):
        return found.st_size
    if place.offset + place.size > found.st_size:
        raise AudioError(place, "truncated")
    return place.size


class _Window(io.RawIOBase):
    """A member of a shard as a file of its own, which libsndfile reads and seeks in."""

    def readable(self) -> bool:
        return True

    seekable = readable  # PyAV asks

    def __init__(self, descriptor: int, member: Member) -> None:
        self._file, self._first, self._size, self._at = descriptor, member.offset, member.size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = memoryview(buffer)[: max(self._size - self._at, 0)]
        count = os.preadv(self._file, [wanted], self._first + self._at) if len(wanted) else 0
        self._at += count
        return count


def _decode(file: _Stream | Foreign, start: int, end: int | None, length: int | None, channel: Channel) -> Tensor:
    """Samples start to end at the file's own rate in one channel: (end - start,); fewer only where `length` is not
    known and the file ends."""
    exact = isinstance(file, SoundFile) and file.subtype.startswith(_EXACT)
    origin = start if exact else start - _WARM_UP
    if file.format == "OGG":
        origin = min(origin, (length or 0) - _LAST_OGG_PAGE)
    origin = at = max(0, origin)
    if origin:
        file.seek(origin)
    parts = [np.zeros((0, 1 if channel == "mean" else file.channels), np.float32)]
    for block in _blocks(file, None if end is None else end - origin):
        wanted = block[max(start - at, 0) :]
        parts.append(_mono(wanted)[:, None] if channel == "mean" else wanted)
        at += len(block)
    if length is not None and end is not None and at < end:
        raise EOFError
    samples = np.concatenate(parts)
    which = {"mean": 0, "left": 0, "right": min(1, file.channels - 1)}.get(channel)
    return torch.from_numpy(samples[:, np.square(samples).sum(0).argmax() if which is None else which])


def _blocks(file: _Stream | Foreign, num: int | None) -> Iterator[np.ndarray]:
    """The next `num` samples (None: all) in blocks of (n, channels), until the file ends."""
    left = math.inf if num is None else num
    while left > 0:
        block = file.read(int(min(_BLOCK // file.channels, left)), dtype="float32", always_2d=True)
        if not len(block):
            return
        yield block
        sign_of_life()
        left -= len(block)


def _mono(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean over channels, (S, channels) -> (S,): NumPy's own along so short an axis takes 30 times as long."""
    channels = samples.shape[1]
    if channels == 1:
        return samples[:, 0]
    total = samples[:, 0] + samples[:, 1]
    for channel in range(2, channels):
        total += samples[:, channel]
    total /= np.float32(channels)
    return total


def _ratio(rate: int, sample_rate: int) -> tuple[int, int]:
    """Every `down` samples in give `up` out.

    The filter bank has about up x down taps: odd pairs (44,101 Hz to 16 kHz) take a fraction within 0.04 % of theirs.
    """
    most = min(1280, math.isqrt(_MOST_TAPS * sample_rate // rate))
    return Fraction(rate, sample_rate).limit_denominator(max(most, 1)).as_integer_ratio()  # exact for all common pairs


@lru_cache(maxsize=32)
def _resampler(down: int, up: int) -> Resample:
    return Resample(down, up)  # computes its kernel once, unlike torchaudio.functional.resample
