"""Spectrograms as images: the input of a phase, its visible part, and the reconstruction.

Legend: B batch, T frames, F mel bins. In the images time runs to the right, frequency upwards, and a cell is a pixel.
"""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from PIL import Image
from torch import Tensor

from ssl_c2f.core.files import write_bytes, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import spread
from ssl_c2f.data.decode import AudioError, read_audio
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.runner import Runner
from ssl_c2f.objectives import Objective

LEVELS = 255  # colours of the scale; the palette has one more for NaN
NOTHING = (128, 128, 128)  # of NaN
# OKLab (a, b) of night, violet, rose, apricot and cream
_ANCHORS = ((0.02, -0.05), (0.07, -0.14), (0.16, -0.02), (0.10, 0.11), (0.0, 0.05))
_LISTEN_RATE = 16000  # Hz; every browser plays an MP3 of that rate
_MAX_COLUMNS = 1200  # a screen shows no more


@cache
def palette() -> npt.NDArray[np.uint8]:
    """(256, 3) sRGB: equal steps of the scale are equal steps of OKLab lightness (Ottosson, 2020). The last: NaN."""
    place = np.linspace(0.0, 1.0, LEVELS)
    a, b = (np.interp(place, np.linspace(0, 1, len(_ANCHORS)), axis) for axis in zip(*_ANCHORS, strict=True))
    lightness = 0.16 + 0.80 * place
    lms = np.stack([
        lightness + 0.3963377774 * a + 0.2158037573 * b,
        lightness - 0.1055613458 * a - 0.0638541728 * b,
        lightness - 0.0894841775 * a - 1.2914855480 * b,
    ]) ** 3
    to_rgb = np.array([
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ])
    linear = np.clip(to_rgb @ lms, 0.0, 1.0)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.concatenate([np.rint(255 * rgb.T).astype(np.uint8), np.array([NOTHING], dtype=np.uint8)])


def value_range(spec: Tensor) -> tuple[float, float]:
    """Ends of the colour scale: the 1 % and 99 % quantiles of the finite values."""
    values = spec[spec.isfinite()]
    if not len(values):
        return 0.0, 1.0
    low, high = np.quantile(values.double().cpu().numpy(), [0.01, 0.99])
    return float(low), float(high)


def png(spec: Tensor, low: float, high: float) -> bytes:
    """A spectrogram (T, F) as PNG; values beyond `low` and `high` take the colours there, NaN is grey."""
    if len(spec) > _MAX_COLUMNS:
        spec = spec[torch.linspace(0, len(spec) - 1, _MAX_COLUMNS).round().long()]
    values = spec.detach().double().cpu().numpy().T[::-1]
    level = np.clip((values - low) / max(high - low, 1e-9), 0.0, 1.0) * (LEVELS - 1)
    indices = np.where(np.isnan(values), LEVELS, np.rint(np.nan_to_num(level))).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette().tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


@torch.no_grad()
def film_strip(objective: Objective, batch: Batch) -> dict[str, bytes]:
    """PNGs of every view of every clip, "0-input", "0-kept", "0-reconstruction", "1-input", ...

    The views of a clip share the input's colour scale and show its real frames only.
    """
    views = objective.pictures(batch)
    strip: dict[str, bytes] = {}
    for i, frames in enumerate(batch.num_frames.tolist()):
        low, high = value_range(views["input"][i, :frames])
        strip |= {f"{i}-{name}": png(view[i, :frames], low, high) for name, view in views.items()}
    return strip


def chosen_clips(corpus: Corpus, count: int = 3) -> list[int]:
    """The same few clips in every phase, spread over the held-out ones (all, where none are)."""
    return list(spread(corpus.held_out or corpus.training, count))


def save_pictures(
    folder: Path, objective: Objective, runner: Runner, masking: Masking | None, *, count: int = 3
) -> dict[str, Path]:
    """Write pictures and sound of a few clips as `runner` reads them, and pictures.json, which describes them.

    The objective is put into evaluation mode for it, and back.

    Returns:
        The files of the pictures, by "CLIP/view".

    Raises:
        UserError: the folder cannot be written, or there are too many unreadable recordings.
    """
    corpus, geometry = runner.corpus, objective.geometry
    clips = chosen_clips(corpus, count)
    was_training = objective.training
    objective.eval()
    found: list[dict[str, Any]] = []
    files: dict[str, Path] = {}
    for batch in replace(runner, batch_size=len(clips)).batches(clips, per_clip=1, masking=masking):
        strip = film_strip(objective, batch)
        for i, clip in enumerate(batch.index.tolist()):
            header = corpus.manifest.clips[clip]
            names = {key.split("-", 1)[1]: f"{key}.png" for key in strip if key.startswith(f"{i}-")}
            for view, name in names.items():
                write_bytes(folder / name, strip[name.removesuffix(".png")])
                files[f"{header.path}/{view}"] = folder / name
            found.append({
                "clip": header.path, "labels": list(header.labels), "pictures": names,
                "sound": _save_sound(folder / f"{i}.mp3", corpus, geometry, clip),
            })
    objective.train(was_training)
    facts = {
        "frame_ms": geometry.hop_ms * geometry.pool, "grid": list(geometry.grid),
        "patch": [geometry.patch_f, geometry.patch_t], "mask_ratio": masking.ratio if masking else None,
        "mask_shape": masking.shape if masking else None, "clips": found,
    }
    write_json(folder / "pictures.json", facts)
    return files


def _save_sound(file: Path, corpus: Corpus, geometry: Geometry, clip: int) -> str | None:
    """The window that the pictures show, to listen to; None if it cannot be read or encoded."""
    ((_, start),) = corpus.windows(geometry, [clip], per_clip=1).windows
    row, begin = corpus.manifest.clips[clip], start / geometry.sample_rate
    seconds = min(geometry.clip_samples / geometry.sample_rate, row.seconds - begin)
    stream = io.BytesIO()
    try:
        first, count = round((row.start + begin) * _LISTEN_RATE), round(seconds * _LISTEN_RATE)
        sound = read_audio(row.place(corpus.manifest.root), _LISTEN_RATE, first, count)
        soundfile.write(stream, sound.numpy(), _LISTEN_RATE, format="MP3", subtype="MPEG_LAYER_III")
    except (AudioError, UserError, soundfile.LibsndfileError, RuntimeError):
        return None  # the picture is shown without its sound
    write_bytes(file, stream.getvalue())
    return file.name
