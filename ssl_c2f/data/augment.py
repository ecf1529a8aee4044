"""Augmentation of normalised log-mel spectrograms; every draw belongs to a clip's key.

Legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.core.options import Options

Factor = Annotated[float, Field(ge=0.25, le=4)]


class AugmentOptions(Options):
    """All off by default. Sizes are physical, so that they mean the same in every phase."""

    mixup_prob: float = Field(0.0, ge=0, le=1, description="share of clips mixed with another one")
    mixup_alpha: float = Field(10.0, gt=0, description="the share of each is drawn from Beta(alpha, alpha)")
    mixup_domain: Literal["log", "power"] = Field(
        "log", description="what is averaged: log-mel values, or power, as two sounds at once add up"
    )
    time_shift: bool = Field(False, description="each clip begins anywhere, its beginning following its end")
    freq_mask: int = Field(0, ge=0, description="SpecAugment: a band of up to so many mel bins becomes the mean")
    time_mask_seconds: float = Field(0.0, ge=0, description="SpecAugment: a stretch of up to so many seconds")
    time_stretch: tuple[Factor, Factor] = Field((1.0, 1.0), description="seconds that become one, least and most")
    mel_stretch: tuple[Factor, Factor] = Field((1.0, 1.0), description="mel ranges that become one, least and most")
    mel_shift: float = Field(0.0, ge=0, le=0.5, description="up to this share of the mel range, up or down")
    gain_db: float = Field(0.0, ge=0, description="deviation of a normal draw")
    tilt_db: float = Field(0.0, ge=0, description="the same at the highest mel bin, and its negative at the lowest")
    mix_prob: float = Field(0.0, ge=0, le=1, description="clips of which one view has another clip in the background")
    mix_power: float = Field(0.4, gt=0, lt=1, description="the other clip's share of the power, at most")

    @field_validator("time_stretch", "mel_stretch")
    @classmethod
    def _ordered(cls, stretch: tuple[float, float]) -> tuple[float, float]:
        if stretch[0] > stretch[1]:
            raise ValueError("the least stretch comes first")
        return stretch

    @property
    def views(self) -> bool:
        """Whether views of clips are made: what they are cut out with, coloured and mixed."""
        plain = (self.time_stretch, self.mel_stretch, self.mel_shift, self.gain_db, self.tilt_db, self.mix_prob)
        return plain != ((1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0, 0.0)


def mixup_share(key: Tensor, options: AugmentOptions) -> float:
    """Weight of the clip itself in the mix; 1 if it is not mixed (Zhang et al., mixup, ICLR 2018)."""
    if options.mixup_prob == 0 or float(draws.uniform(draws.key(key, "mixup"), 1)) >= options.mixup_prob:
        return 1.0
    return float(np.random.default_rng(draws.seed(int(key), "share")).beta(options.mixup_alpha, options.mixup_alpha))


def _band(keys: Tensor, name: str, longest: int, length: Tensor, size: int) -> Tensor:
    """(B, size) bool: a band of 0 ... `longest` cells placed anywhere within the first `length` (B,)."""
    width = draws.integers(draws.key(keys, name, "width"), longest + 1).minimum(length)
    start = draws.integers(draws.key(keys, name, "start"), length - width + 1)[:, None]
    cells = torch.arange(size, device=keys.device)
    return (cells >= start) & (cells < start + width[:, None])


def shifted(spec: Tensor, num_frames: Tensor, keys: Tensor) -> Tensor:
    """The (B, num_frames) real frames of each clip turned in a circle by a random length: (B, T, F) -> (B, T, F)."""
    start = draws.integers(draws.key(keys, "shift"), num_frames)
    place = torch.arange(spec.shape[1], device=spec.device)
    turned = (place + start[:, None]) % num_frames[:, None]
    return spec.gather(1, torch.where(place < num_frames[:, None], turned, place)[..., None].expand_as(spec))


def spec_augment(spec: Tensor, num_frames: Tensor, keys: Tensor, freq_mask: int, time_mask: int) -> Tensor:
    """Put one frequency band and one stretch of frames to 0, the mean of normalised input (Park et al., 2019).

    Args:
        spec: (B, T, F). num_frames: (B,) real frames. keys: (B,).
        freq_mask, time_mask: the longest band, in mel bins and frames.
    """
    hidden = torch.zeros(spec.shape[:2], dtype=torch.bool, device=spec.device)[..., None]
    if time_mask:
        hidden = hidden | _band(keys, "time", time_mask, num_frames, spec.shape[1])[:, :, None]
    if freq_mask:
        bins = torch.full_like(num_frames, spec.shape[2])
        hidden = hidden | _band(keys, "frequency", freq_mask, bins, spec.shape[2])[:, None]
    return spec.masked_fill(hidden, 0.0)
