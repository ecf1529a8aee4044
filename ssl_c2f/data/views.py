"""Views of a clip: random stretches of its time and mel range, as spectrograms of one size, changed as a room, a
speaker or a microphone might.

Two views of a clip are what the objective `views` calls the same sound; one view in place of the clip is augmentation.
Every draw belongs to a view's key. Legend: B views, T frames of the clip, V frames of the view, F mel bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.core import draws
from ssl_c2f.data.augment import AugmentOptions

_NATS = math.log(10) / 10  # of power, in a decibel


def cut(spec: Tensor, num_frames: Tensor, keys: Tensor, size: int, options: AugmentOptions) -> tuple[Tensor, Tensor]:
    """A random stretch of each clip as `size` frames, linear between frames and between mel bins.

    A clip that is too short for the stretch drawn is stretched less; one that is shorter than the least stretch gives a
    shorter view.

    Args:
        spec: (B, T, F). num_frames: (B,) real frames. keys: (B,).

    Returns:
        (B, V, F), 0 in padding, and (B,) the real frames of the views.
    """
    drawn = draws.uniform(draws.key(keys, "cut"), 4)
    frames = num_frames.to(drawn.dtype)
    least, most = options.time_stretch
    most_here = (frames / size).clamp(least, most)
    rate = least + drawn[:, 0] * (most_here - least)  # frames of the clip in one of the view
    length = (frames / rate + 1e-3).floor().clamp(1, size)
    start = drawn[:, 1] * (frames - rate * length).clamp(min=0)
    place = torch.arange(size, device=spec.device)
    time = (start[:, None] + (place + 0.5) * rate[:, None] - 0.5).clamp(min=0).minimum(frames[:, None] - 1)
    scale = options.mel_stretch[0] + drawn[:, 2] * (options.mel_stretch[1] - options.mel_stretch[0])
    shift = (2 * drawn[:, 3] - 1) * options.mel_shift
    mels = (torch.arange(spec.shape[2], device=spec.device) + 0.5) / spec.shape[2] - 0.5  # of the range, from its mid
    mel = mels * scale[:, None] + shift[:, None]
    grid = torch.stack([
        (2 * mel)[:, None].expand(-1, size, -1),
        ((2 * time + 1) / spec.shape[1] - 1)[..., None].expand(-1, -1, spec.shape[2]),
    ], dim=-1)
    view = F.grid_sample(spec[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    return view.masked_fill((place >= length[:, None])[..., None], 0.0), length.long()


def colour(keys: Tensor, num_mels: int, options: AugmentOptions) -> Tensor:
    """(B, 1, F) what is added to a log-mel spectrogram: a gain, and a tilt between its lowest and its highest bin."""
    noise = torch.special.ndtri(draws.uniform(draws.key(keys, "colour"), 2).clamp(1e-4, 1 - 1e-4))[:, :, None, None]
    slope = torch.linspace(-1, 1, num_mels, device=keys.device)
    added: Tensor = _NATS * (options.gain_db * noise[:, 0] + options.tilt_db * noise[:, 1] * slope)
    return added


def mix(
    spec: Tensor, num_frames: Tensor, other: Tensor, other_frames: Tensor, share: Tensor, std: float
) -> Tensor:
    """The log-mel spectrogram of two sounds at once, of which `other` has the `share` (B,) of the power.

    Both (B, V, F) are normalised, `std` being what divided them. Behind its (B,) frames each is silent; where both are,
    the result is 0.
    """
    frames = torch.arange(spec.shape[1], device=spec.device)
    first, second = (
        (x * std + part.clamp(min=1e-6).log()[:, None, None]).masked_fill(
            ((frames >= end[:, None]) | (part == 0)[:, None])[..., None], -torch.inf)
        for x, end, part in ((spec, num_frames, 1 - share), (other, other_frames, share))
    )
    both: Tensor = torch.logaddexp(first, second) / std
    return both.masked_fill(both == -torch.inf, 0.0)
