"""What a recording sounds like before anything learns from it: silent, clipped, cancelled, or there twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ssl_c2f.data.decode import Place, answered, read_blocks

_SILENT = 1e-4  # greatest sample, of 1: -80 dB
_FULL = 0.9999  # a sample that is as large as can be ...
_CLIPPED = 1e-3  # ... and the fraction of such samples from which a recording counts as clipped
_CANCELLED = 0.01  # power of the mean of the channels, of their mean power: -20 dB


@dataclass(frozen=True)
class Sound:
    """What was found in the samples of one recording."""

    silent: bool
    clipped: bool
    cancels: bool  # its channels are nearly opposite, so that their mean is nearly nothing
    digest: bytes  # of its samples


def examine(place: Place) -> Sound:
    """Decode a recording whole, in little memory. Raises AudioError."""
    return answered(place, lambda: _examine(place))


def _examine(place: Place) -> Sound:
    peak, full, count, power, of_mean, digest = 0.0, 0, 0, 0.0, 0.0, hashlib.sha256()
    for block in read_blocks(place):
        size, mean = np.abs(block), block.mean(axis=1)
        peak, full, count = max(peak, float(size.max())), full + int((size >= _FULL).sum()), count + block.size
        power += float(np.square(block, dtype=np.float64).mean(axis=1).sum())
        of_mean += float(np.square(mean, dtype=np.float64).sum())
        digest.update(block.tobytes())
    silent = peak < _SILENT
    return Sound(silent, full > _CLIPPED * count, not silent and of_mean < _CANCELLED * power, digest.digest())


def remarks(sounds: Mapping[str, Sound], rates: Mapping[str, int]) -> dict[str, list[str]]:
    """Kinds of recordings that deserve a look -> their paths; of duplicates all but the first. Only what there is."""
    usual = Counter(rates.values()).most_common(1)[0][0] if rates else 0
    first: dict[bytes, str] = {}
    twice = [
        f"{path} (as {first[sound.digest]})" for path, sound in sounds.items()
        if not sound.silent and first.setdefault(sound.digest, path) != path
    ]
    kinds = {
        "silent": [path for path, sound in sounds.items() if sound.silent],
        "clipped": [path for path, sound in sounds.items() if sound.clipped],
        "with channels that cancel each other (data.channel=left reads one)":
            [path for path, sound in sounds.items() if sound.cancels],
        f"not at {usual} Hz as most": [f"{path} ({rates[path]} Hz)" for path in sounds if rates[path] != usual],
        "the same as another": twice,
    }
    return {kind: paths for kind, paths in kinds.items() if paths}
