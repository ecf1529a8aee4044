"""Audio files that are damaged, lying or extreme: 1,000 of them from one seed."""

from __future__ import annotations

import io
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import soundfile

RATE, SAMPLES = 8000, 3200
FORMATS = {  # name -> ending, format, encoding
    "pcm16": ("wav", "WAV", "PCM_16"), "pcm24": ("wav", "WAV", "PCM_24"), "float": ("wav", "WAV", "FLOAT"),
    "double": ("wav", "WAVEX", "DOUBLE"), "ulaw": ("wav", "WAV", "ULAW"), "adpcm": ("wav", "WAV", "IMA_ADPCM"),
    "rf64": ("wav", "RF64", "PCM_16"), "flac": ("flac", "FLAC", "PCM_16"), "vorbis": ("ogg", "OGG", "VORBIS"),
    "opus": ("ogg", "OGG", "OPUS"), "mp3": ("mp3", "MP3", "MPEG_LAYER_III"),
}
Draw = random.Random
BIG = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 10**9)


@dataclass(frozen=True)
class Hostile:
    """A file: its name, its bytes, and what a reader must make of it: "good", "bad", or "" where either will do."""

    name: str
    data: bytes
    expected: str = ""


def files(count: int, seed: int = 0) -> Iterator[Hostile]:
    """The first `count` files; every kind comes again and again, with other draws."""
    for i in range(count):
        draw = Draw(f"{seed} {i}")
        kind = KINDS[i % len(KINDS)]
        ending, data, expected = kind(draw)
        yield Hostile(f"{i:04}-{kind.__name__.strip('_')}.{ending}", data, expected)


@cache
def sound(name: str, channels: int = 1, rate: int = RATE, samples: int = SAMPLES) -> bytes:
    """A file that is in order."""
    _, container, encoding = FORMATS[name]
    time = np.arange(samples) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * np.random.default_rng(0).standard_normal(samples)
    return encode(np.repeat(wave[:, None], channels, 1), rate, container, encoding)


def encode(wave: np.ndarray, rate: int, container: str = "WAV", encoding: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, encoding, format=container)
    return buffer.getvalue()


Made = tuple[str, bytes, str]


def _any(draw: Draw) -> tuple[str, bytearray]:
    name = draw.choice([*FORMATS])
    return FORMATS[name][0], bytearray(sound(name))


def flipped(draw: Draw) -> Made:
    ending, data = _any(draw)
    for _ in range(draw.choice((1, 1, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return ending, bytes(data), ""


def flipped_header(draw: Draw) -> Made:
    ending, data = _any(draw)
    for _ in range(draw.choice((1, 2, 4))):
        data[draw.randrange(min(len(data), 120))] ^= 1 << draw.randrange(8)
    return ending, bytes(data), ""


def number_in_header(draw: Draw) -> Made:
    """A 16-, 32- or 64-bit number of either byte order somewhere in the head of the file."""
    ending, data = _any(draw)
    form = draw.choice(("<H", "<I", ">I", "<Q", ">H"))
    at = draw.randrange(4, min(len(data), 120) - 8)
    data[at : at + struct.calcsize(form)] = struct.pack(form, draw.choice(BIG) % 256 ** struct.calcsize(form))
    return ending, bytes(data), ""


def cut(draw: Draw) -> Made:
    ending, data = _any(draw)
    return ending, bytes(data[: draw.choice((0, 1, 4, 12, 44, 45, draw.randrange(len(data)), len(data) - 1))]), ""


def joined(draw: Draw) -> Made:
    """Two files, of one kind or of two, or what is left of them."""
    (ending, first), (_, second) = _any(draw), _any(draw)
    return ending, bytes(draw.choice((first + first, first + second, first[: len(first) // 2] + second))), ""


def wrong_ending(draw: Draw) -> Made:
    return draw.choice(("wav", "flac", "ogg", "mp3")), bytes(_any(draw)[1]), ""


def junk(draw: Draw) -> Made:
    size = draw.choice((0, 1, 100, 10_000))
    head = draw.choice((b"", b"RIFF", b"fLaC", b"OggS", b"ID3\x04", b"\xff\xfb\x90\x64", b"\0" * 50))
    return draw.choice(("wav", "flac", "ogg", "mp3")), head + draw.randbytes(size), ""


def zeroed(draw: Draw) -> Made:
    ending, data = _any(draw)
    at = draw.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    return ending, bytes(data), ""


def wav_length(draw: Draw) -> Made:
    """The length of a WAV's data is whatever the recorder left there; all its sound is behind it."""
    data = bytearray(sound(draw.choice(("pcm16", "float"))))
    at = data.index(b"data") + 4
    size = draw.choice(BIG)
    data[at : at + 4] = struct.pack("<I", size)
    if draw.random() < 0.5:
        data[4:8] = struct.pack("<I", draw.choice(BIG))
    return "wav", bytes(data), ""


def wav_format(draw: Draw) -> Made:
    """A field of WAV's format chunk."""
    data = bytearray(sound("pcm16"))
    at, form, values = draw.choice((
        (22, "<H", (0, 2, 64, 65, 255, 1024, 65535)), (24, "<I", (0, 1, 6, 999, 768_001, 10**6, 10**9, 2**32 - 1)),
        (32, "<H", (0, 1, 3, 65535)), (34, "<H", (0, 1, 7, 12, 24, 64, 65535)), (20, "<H", (0, 2, 3, 6, 7, 17, 65534)),
    ))
    data[at : at + struct.calcsize(form)] = struct.pack(form, draw.choice(values))
    return "wav", bytes(data), ""


def flac_length(draw: Draw) -> Made:
    """FLAC's 36-bit count of samples: 0 is legal, and says that it is not known."""
    data = bytearray(sound("flac"))
    total = draw.choice((0, 0, 1, SAMPLES - 1, SAMPLES + 1, 10**6, 2**35, 2**36 - 1))
    data[21] = data[21] & 0xF0 | total >> 32
    data[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return "flac", bytes(data), "good" if total == 0 else ""


def flac_header(draw: Draw) -> Made:
    data = bytearray(sound("flac"))
    data[8 + draw.randrange(18)] = draw.choice((0, 1, 255, draw.randrange(256)))
    return "flac", bytes(data), ""


def ogg_granule(draw: Draw) -> Made:
    """The position of Ogg's last page, which stands for the length; with a checksum that is right again."""
    data = bytearray(sound(draw.choice(("vorbis", "opus"))))
    at = data.rindex(b"OggS")
    position = draw.choice((0, 1, -1, 2**31, 2**40, 2**62, -(2**63)))
    data[at + 6 : at + 14] = struct.pack("<q", position)
    return "ogg", _with_crc(data, at), ""


def ogg_channels(draw: Draw) -> Made:
    """Channels and rate of Vorbis' first header."""
    data = bytearray(sound("vorbis"))
    at = data.index(b"vorbis") + 6
    if draw.random() < 0.5:
        data[at + 4] = draw.choice((0, 2, 64, 65, 255))
    else:
        data[at + 5 : at + 9] = struct.pack("<I", draw.choice((0, 1, 6, 10**6, 10**9, 2**32 - 1)))
    return "ogg", _with_crc(data, 0), ""


def mp3_frames(draw: Draw) -> Made:
    """The count of frames in an MP3's Xing or Info header."""
    data = bytearray(sound("mp3"))
    at = max(data.find(b"Xing"), data.find(b"Info"))
    if at > 0:
        data[at + 8 : at + 12] = struct.pack(">I", draw.choice(BIG))
    return "mp3", bytes(data), ""


def odd_rate(draw: Draw) -> Made:
    rate = draw.choice((1, 2, 6, 999, 1000, 7999, 11_127, 384_000, 768_000, 768_001, 500_000_000, 2**31 - 1))
    wave = 0.1 * np.random.default_rng(0).standard_normal(draw.choice((1, 200, 3000)))
    return "wav", encode(wave, rate, "WAV", "PCM_16"), "" if 1000 <= rate <= 768_000 else "bad"


def many_channels(draw: Draw) -> Made:
    channels = draw.choice((2, 3, 8, 64, 65, 255, 1024))
    wave = np.zeros((100, channels)) + 0.1
    return "wav", encode(wave, RATE, "WAV", "PCM_16"), "good" if channels <= 64 else "bad"


def extreme_samples(draw: Draw) -> Made:
    """A few samples among good ones, or all of them."""
    wave = 0.3 * np.sin(np.arange(SAMPLES) / 3)
    value = draw.choice((1e20, -1e20, 3e38, 1e10, np.nan, np.inf, -np.inf, 1e-45, 0.0, 1.0, -1.0, 40.0))
    if draw.random() < 0.6:
        wave[[draw.randrange(SAMPLES) for _ in range(3)]] = value
    else:
        wave[:] = value
    bad = not np.isfinite(value) or abs(value) > 2**31
    return "wav", encode(wave, RATE, "WAV", draw.choice(("FLOAT", "DOUBLE"))), "bad" if bad else "good"


def tiny(draw: Draw) -> Made:
    count = draw.choice((0, 1, 2, 10, 79, 80, 199, 200, 201))
    name = draw.choice([*FORMATS])
    ending, container, encoding = FORMATS[name]
    return ending, encode(np.full(count, 0.1), RATE, container, encoding), "bad" if count == 0 else ""


def intact(draw: Draw) -> Made:
    name = draw.choice([*FORMATS])
    return FORMATS[name][0], sound(name, draw.choice((1, 2))), "good"


KINDS: tuple[Callable[[Draw], Made], ...] = (
    flipped, flipped_header, number_in_header, cut, joined, wrong_ending, junk, zeroed, wav_length, wav_format,
    flac_length, flac_header, ogg_granule, ogg_channels, mp3_frames, odd_rate, many_channels, extreme_samples, tiny,
    intact,
)


def _with_crc(data: bytearray, at: int) -> bytes:
    """The file with the right checksum in the Ogg page that begins at `at`."""
    count = data[at + 26]
    end = at + 27 + count + sum(data[at + 27 : at + 27 + count])
    data[at + 22 : at + 26] = bytes(4)
    crc = 0
    for byte in data[at:end]:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    data[at + 22 : at + 26] = struct.pack("<I", crc)
    return bytes(data)


if __name__ == "__main__":  # python tests/fuzz/audio.py FOLDER: to look at them
    import sys

    os.makedirs(sys.argv[1], exist_ok=True)
    for file in files(1000):
        with open(os.path.join(sys.argv[1], file.name), "wb") as stream:
            stream.write(file.data)
