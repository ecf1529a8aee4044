"""Files that libsndfile does not read as they are: AAC and others, through PyAV, and MP3 files that hold no length.

S: samples of audio.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import soundfile

if TYPE_CHECKING:
    import av

INSTALL = "pip install 'ssl_c2f[formats]'"
# The usual endings of libsndfile's formats, where they are not the format's name. Some are no recordings.
_ALSO = {
    "AIFF": "aiff aif aifc", "AU": "au snd", "OGG": "ogg oga opus", "SVX": "iff svx", "NIST": "sph nist", "IRCAM": "sf",
    "RAW": "", "MAT4": "", "MAT5": "", "MPC2K": "", "WAVEX": "",
}
# Endings that PyAV reads, whose wheels bring FFmpeg, and how such files begin: what libsndfile cannot open and begins
# otherwise is damaged, however much of a sound FFmpeg would make of it.
FOREIGN = frozenset(
    {".m4a", ".m4b", ".aac", ".mp4", ".mov", ".webm", ".mka", ".mkv", ".wma", ".3gp", ".amr", ".ac3", ".ape", ".wv"}
)
_SIGNATURES = (
    (4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (0, b"0&\xb2u"), (0, b"\xff\xf1"), (0, b"\xff\xf9"), (0, b"#!AMR"),
    (0, b"\x0bw"), (0, b"MAC "), (0, b"wvpk"),
)
_TAGS = (b"Xing", b"Info", b"VBRI")  # in an MP3 file's first frame: they hold its number of frames


def has_av() -> bool:
    """Whether PyAV is installed."""
    return find_spec("av") is not None


def endings() -> frozenset[str]:
    """Endings of the files that can be read here, in lower case."""
    own = (_ALSO.get(name, name.lower()).split() for name in soundfile.available_formats())
    return frozenset(f".{ending}" for names in own for ending in names) | (FOREIGN if has_av() else frozenset())


def is_foreign(file: BinaryIO) -> bool:
    """Whether a file begins like one of the formats that only PyAV reads."""
    file.seek(0)
    head = file.read(16)
    return any(head[at:].startswith(signature) for at, signature in _SIGNATURES)


def has_no_length(file: BinaryIO) -> bool:
    """Whether a file is MP3 without a count of its frames: libsndfile then takes the first frame's bit rate for that of
    all, and stops where the file would end if it were."""
    file.seek(0)
    head, start = file.read(10), 0
    if head[:3] == b"ID3" and len(head) == 10:  # the length of what comes first, seven bits to a byte
        a, b, c, d = head[6:]
        start = 10 + (a << 21 | b << 14 | c << 7 | d)
    file.seek(start)
    frame = file.read(256)
    is_mp3 = len(frame) > 1 and frame[0] == 0xFF and frame[1] & 0xE6 == 0xE2
    return is_mp3 and not any(tag in frame for tag in _TAGS)


class Endless(io.RawIOBase):
    """A file that claims to be far longer than it is, so that libsndfile reads it to its real end."""

    _FACTOR = 64  # bit rates of MP3 differ by up to 40

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._at = file, file.seek(0, os.SEEK_END), 0
        self._claimed = self._size * self._FACTOR

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._claimed}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)
        if self._at >= self._claimed - 256:  # where a tag may be: there is none
            count = max(min(len(view), self._claimed - self._at), 0)
            view[:count] = bytes(count)
        else:
            self._file.seek(self._at)
            count = self._file.readinto(view) or 0 if self._at < self._size else 0  # type: ignore[attr-defined]
        self._at += count
        return count


class Foreign:
    """A file that PyAV reads, with as much of SoundFile's interface as `decode` uses.

    Its length is known when it was decoded to its end: headers tell a bit rate, or a time to the millisecond.

    Raises:
        OSError: there is no audio in it, or it is damaged.
    """

    format, extra_info = "FOREIGN", ""

    def __init__(self, file: BinaryIO) -> None:
        import av

        av.logging.set_level(None)
        self._errors = (av.FFmpegError, ValueError)  # ValueError: of another rate or layout than before
        try:
            self._container = av.open(file, "r")
            if not self._container.streams.audio:
                raise OSError("no audio stream")
            self._stream = self._container.streams.audio[0]
            self._frames = self._decoded(0)
            self._next = next(self._frames, None)  # tells the rate, which AAC's header may give as half of it
        except self._errors as error:
            raise OSError(str(error)) from None
        if self._next is None:
            raise OSError("no audio")
        self.samplerate, self.channels = self._next_rate, len(self._next)

    def __enter__(self) -> Foreign:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def seek(self, sample: int) -> None:
        """Go to a sample. Only MP4 says which sample a packet begins with: all else is decoded from its beginning."""
        if "mp4" in self._container.format.name and self._stream.time_base:
            self._container.seek(int(sample / self.samplerate / self._stream.time_base), stream=self._stream)
            self._frames = self._decoded(sample)
        else:
            self._frames = self._decoded(sample, self._next)
        self._next = next(self._frames, None)

    def read(self, num: int, **_: object) -> np.ndarray:
        """The next samples, fewer at the end: (S, channels) float32."""
        parts, left = [np.zeros((0, self.channels), np.float32)], num
        try:
            while left and self._next is not None:
                parts.append(self._next[:, :left].T)
                self._next = self._next[:, left:] if self._next.shape[1] > left else next(self._frames, None)
                left -= len(parts[-1])
        except self._errors as error:
            raise OSError(str(error)) from None
        return np.concatenate(parts)

    def _decoded(self, skip: int, first: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Pieces of (channels, S) from sample `skip` of the file on, `first` being what was decoded already."""
        import av

        resampler: av.AudioResampler | None = None
        at = None if first is None else 0
        if first is not None:
            yield from _after(first, skip)
            at = first.shape[1]
        for frame in self._container.decode(self._stream):
            resampler = resampler or av.AudioResampler("fltp", frame.layout, frame.sample_rate)
            self._next_rate = frame.sample_rate
            if at is None:  # where it is, after a seek; each format counts from its first sample
                pts, unit = frame.pts or 0, frame.time_base or 0
                at = round(pts * unit * frame.sample_rate) if skip else 0
            for piece in resampler.resample(frame):
                samples = piece.to_ndarray()
                yield from _after(samples, skip - at)
                at += samples.shape[1]


def _after(samples: np.ndarray, skip: int) -> Iterator[np.ndarray]:
    if skip < samples.shape[1]:
        yield samples[:, max(skip, 0) :]
