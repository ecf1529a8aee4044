"""Procedural sound events, for demos and tests that need audio of their own.

The classes come in pairs that share their mean spectrum and differ only in how it unfolds in time: up or down, decay or
swell, slow or fast. Pitch, rate, duration, onset, gain and background noise are drawn per clip.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from ssl_c2f.core import draws

Samples = npt.NDArray[np.float64]

CLASSES = (
    "am_fast",
    "am_slow",
    "chirp_down",
    "chirp_up",
    "clicks_fast",
    "clicks_slow",
    "fm_fast",
    "fm_slow",
    "noise_decay",
    "noise_swell",
    "stack_down",
    "stack_up",
)
_FOLDS = 5
_RATES = {"slow": (3.0, 5.0), "fast": (10.0, 16.0)}  # Hz, of modulations and clicks
_REVERSED = ("down", "swell")  # events played backwards


def render(class_name: str, seed: int, seconds: float, sample_rate: int) -> npt.NDArray[np.float32]:
    """One clip of a class: (seconds * sample_rate,), in [-1, 1]; the same for the same arguments.

    Raises:
        ValueError: no such class.
    """
    if class_name not in CLASSES:
        raise ValueError(f"no class {class_name!r}; there are {', '.join(CLASSES)}")
    rng = np.random.default_rng([seed, CLASSES.index(class_name)])
    kind, variant = class_name.split("_")
    num_samples = round(seconds * sample_rate)
    length = round(num_samples * rng.uniform(0.5, 0.9))
    rate = rng.uniform(*_RATES.get(variant, (0.0, 0.0)))
    event = _event(kind, length, rate, sample_rate, rng)[:: -1 if variant in _REVERSED else 1]
    fade = np.minimum(1.0, np.arange(length) / (0.01 * sample_rate))  # no audible edges
    clip: Samples = rng.standard_normal(num_samples) * 10 ** rng.uniform(-2.0, -1.25)  # the background
    onset = rng.integers(num_samples - length + 1)
    clip[onset : onset + length] += event * fade * fade[::-1]
    clip *= 10 ** rng.uniform(-1.0, 0.0) / np.abs(clip).max(initial=1e-9)
    return clip.astype(np.float32)


def write_dataset(
    folder: Path, *, clips_per_class: int, seconds: float, sample_rate: int = 16000, seed: int = 0
) -> None:
    """Write `folder/CLASS/FOLD-NUMBER-A.wav`: 16 bit, the folds 1 to 5 in turn, named as in ESC-10."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(clips_per_class):
            clip = render(name, draws.seed(seed, index), seconds, sample_rate)
            soundfile.write(folder / name / f"{index % _FOLDS + 1}-{index:04d}-A.wav", clip, sample_rate)


def _event(kind: str, length: int, rate: float, sample_rate: int, rng: np.random.Generator) -> Samples:
    """The sound itself: (length,), about 1 at its loudest."""
    seconds = np.arange(length) / sample_rate
    share = np.arange(length) / length  # 0 to 1 over the event
    pitch: float = sample_rate * 2 ** rng.uniform(-6.0, -4.0)  # Hz: 250 to 1000 at 16 kHz

    def phase(octaves: Samples) -> Samples:
        """The phase of an oscillator that is `octaves` above the pitch."""
        return np.asarray(2 * np.pi * np.cumsum(pitch * 2.0**octaves) / sample_rate)

    match kind:
        case "am":
            return np.sin(2 * np.pi * pitch * seconds) * (0.5 + 0.5 * np.sin(2 * np.pi * rate * seconds))
        case "fm":
            return np.sin(phase(0.3 * np.sin(2 * np.pi * rate * seconds)))
        case "chirp":
            return np.sin(phase(rng.uniform(1.0, 1.5) * share))
        case "stack":  # four notes of a scale, each with four harmonics
            notes = phase(np.floor(4 * share) / 4)
            return sum((np.sin(h * notes) / h for h in range(1, 5)), start=np.zeros(length)) / 2
        case "noise":
            return rng.standard_normal(length) / 3 * np.exp(-4 * share)
        case "clicks":  # the decay follows the period, so that slow and fast trains are equally loud
            return rng.standard_normal(length) / 3 * np.exp(-8 * (rate * seconds % 1))
    raise AssertionError(kind)
