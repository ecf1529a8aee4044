"""From the audio of a loader to the batch of an objective, on the device: spectrograms, augmentation, masks.

Legend: B batch, S samples, T frames, F mel bins, N tokens, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_c2f.core import draws
from ssl_c2f.curriculum.compress import pool_time
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.augment import AugmentOptions, shifted, spec_augment
from ssl_c2f.data.masks import Mask, draw_mask
from ssl_c2f.data.spectrogram import Fbank
from ssl_c2f.data.views import colour, cut, mix


@dataclass(frozen=True)
class Items:
    """A batch of crops from a loader: waveforms, or the log-mel of those whose recordings are cached."""

    audio: Tensor | None  # (B, S); None where `log_mel` is given
    num_samples: Tensor  # (B,) real samples of the crop
    index: Tensor  # (B,) clip of the set
    keys: Tensor  # (B,) of (seed, epoch, clip)
    labels: Tensor  # (B, C) of 0 and 1; C is 0 in an unlabelled set
    partner: Items | None = None  # what each clip is mixed with ...
    share: Tensor | None = None  # ... and (B,) the weight of the clip itself
    bad: tuple[tuple[str, str], ...] = ()  # (path, reason) of files that could not be read and were replaced
    log_mel: Tensor | None = None  # (B, T, F), not pooled

    def to(self, device: torch.device) -> Items:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, partner=self.partner and self.partner.to(device))


@dataclass(frozen=True)
class Batch:
    """What an objective sees."""

    spec: Tensor  # (B, T, F) normalised; 0 in padding
    num_frames: Tensor  # (B,) real frames
    index: Tensor
    keys: Tensor
    labels: Tensor
    geometry: Geometry
    short: bool  # some clip has fewer columns of tokens than a full-length one
    masks: tuple[Mask, ...] = ()

    @cached_property
    def valid(self) -> Tensor | None:
        """(B, N) bool, False where a token is padding; None if no token is, so that attention needs no mask."""
        if not self.short:
            return None
        columns = torch.arange(self.geometry.columns, device=self.spec.device)
        real = columns < self.geometry.tokens_t(self.num_frames)[:, None]
        return real.repeat(1, self.geometry.grid_f)


@dataclass(frozen=True)
class Statistics:
    """Input statistics of one geometry: the input is (x - mean) / (factor std)."""

    mean: float
    std: float
    factor: float = 1.0

    def check(self) -> None:
        """Raises ValueError: no log-mel values have these."""
        if not (abs(self.mean) < 1000 and 1e-6 < self.std < 1000 and 1e-3 < self.factor < 1000):
            values = f"mean {self.mean:g}, std {self.std:g} and factor {self.factor:g}"
            raise ValueError(f"{values} are no input's statistics")


class FrontEnd(nn.Module):
    """Filterbank, compression, normalisation, augmentation and masks of one geometry."""

    def __init__(self, geometry: Geometry, statistics: Statistics) -> None:
        super().__init__()
        g = self.geometry = geometry
        self.statistics = statistics
        self.fbank = Fbank(g.sample_rate, g.hop, g.window, g.num_mels, g.f_min, g.f_max)

    @property
    def device(self) -> torch.device:
        return self.fbank.hann.device

    def log_mel(self, audio: Tensor) -> Tensor:
        """(B, S) -> (B, T, F) before pooling."""
        spec: Tensor = self.fbank(F.pad(audio, (0, max(0, self.geometry.window - audio.shape[1]))))
        return spec

    def compress(self, log_mel: Tensor, num_samples: Tensor) -> Tensor:
        """(B, T, F) of clips of (B,) real samples -> (B, T / pool, F): what one sees of it in this geometry."""
        g = self.geometry
        return log_mel if g.pool_kind == "none" else pool_time(log_mel, g.raw_frames(num_samples), g.pool, g.pool_kind)

    def _input(self, items: Items) -> tuple[Tensor, Tensor]:
        """Normalised, padded with 0 to the geometry's frames."""
        log_mel = items.log_mel
        if log_mel is None:
            assert items.audio is not None
            log_mel = self.log_mel(items.audio)
        spec, num_frames = self.compress(log_mel, items.num_samples), self.geometry.frames(items.num_samples)
        spec = (spec - self.statistics.mean) / (self.statistics.factor * self.statistics.std)
        spec = F.pad(spec, (0, 0, 0, self.geometry.num_frames - spec.shape[1]))
        frames = torch.arange(spec.shape[1], device=spec.device)
        return spec.masked_fill((frames >= num_frames[:, None])[..., None], 0.0), num_frames

    @torch.no_grad()
    def forward(self, items: Items, masking: Masking | None = None, augment: AugmentOptions | None = None) -> Batch:
        """The batch on the device of this module, wherever the items are."""
        g, items, augment = self.geometry, items.to(self.device), augment or AugmentOptions()
        if masking and masking.view_seconds:
            return self._views(items, masking, augment)
        spec, num_frames = self._one_view(items, augment)
        labels = items.labels
        if items.partner is not None and augment.mix_prob:
            other, ends = self._one_view(items.partner, augment)
            share = _background(items.keys, 1, augment)
            spec = mix(spec, num_frames, other, ends.minimum(num_frames), share, self._std)
        if items.partner is not None and items.share is not None:
            other, other_frames = self._one_view(items.partner, augment)
            if augment.mixup_domain == "power":
                spec = mix(spec, num_frames, other, other_frames, 1 - items.share, self._std)
            else:
                spec = torch.lerp(other, spec, items.share[:, None, None])
            labels = torch.lerp(items.partner.labels, labels, items.share[:, None])
            num_frames = torch.where(items.share < 1, torch.maximum(num_frames, other_frames), num_frames)
        if augment.freq_mask or augment.time_mask_seconds:
            time_mask = round(augment.time_mask_seconds * g.sample_rate / g.crop_step)
            spec = spec_augment(spec, num_frames, items.keys, augment.freq_mask, time_mask)
        short = bool((g.tokens_t(num_frames) < g.columns).any())
        batch = Batch(spec, num_frames, items.index, items.keys, labels, g, short)
        if masking is None:
            return batch
        return replace(batch, masks=_masks(items.keys, g, [g.tokens_t(num_frames)] * masking.num_masks, masking))

    @property
    def _std(self) -> float:
        """What the log-mel values are divided by."""
        return self.statistics.factor * self.statistics.std

    def _one_view(self, items: Items, augment: AugmentOptions) -> tuple[Tensor, Tensor]:
        """(B, T, F) of clips as they are, or of one view of each that is as long as the clip."""
        g = self.geometry
        spec, frames = self._input(items)
        if augment.views:
            spec, frames = self._cut(spec, frames, items.keys, g.frames(g.clip_samples), augment)
            spec = F.pad(spec, (0, 0, 0, g.num_frames - spec.shape[1]))
        return shifted(spec, frames, items.keys) if augment.time_shift else spec, frames

    def _cut(
        self, spec: Tensor, num_frames: Tensor, keys: Tensor, size: int, augment: AugmentOptions
    ) -> tuple[Tensor, Tensor]:
        """(B, size, F), and (B,) real frames: a stretch of each clip with a gain and a tilt; 0 in padding."""
        views, lengths = cut(spec, num_frames, keys, size, augment)
        views = views + colour(keys, spec.shape[2], augment) / self._std
        frames = torch.arange(size, device=spec.device)
        return views.masked_fill((frames >= lengths[:, None])[..., None], 0.0), lengths

    def _views(self, items: Items, m: Masking, augment: AugmentOptions) -> Batch:
        """Views of each clip, (V B, T, F) view after view, with a mask (B, N) for each."""
        g = self.geometry.stretch(m.view_seconds or 0.0)
        keys = torch.cat([draws.key(items.keys, "view", view) for view in range(m.num_masks)])
        spec, frames = self._input(items)
        spec, frames = spec.repeat(m.num_masks, 1, 1), frames.repeat(m.num_masks)
        views, lengths = self._cut(spec, frames, keys, g.num_frames, augment)
        if items.partner is not None:
            other, ends = cut(*self._input(items.partner), draws.key(items.keys, "background"), g.num_frames, augment)
            share = _background(items.keys, m.num_masks, augment)
            ends = torch.minimum(ends.repeat(m.num_masks), lengths)
            views = mix(views, lengths, other.repeat(m.num_masks, 1, 1), ends, share, self._std)
        columns = g.tokens_t(lengths)
        short = bool((columns < g.columns).any())
        batch = Batch(views, lengths, items.index, items.keys, items.labels, g, short)
        return replace(batch, masks=_masks(items.keys, g, columns.chunk(m.num_masks), m))


def _masks(keys: Tensor, g: Geometry, columns: Sequence[Tensor], m: Masking) -> tuple[Mask, ...]:
    """A mask for each view, of so many (B,) real columns."""
    size_t = m.seconds and (g.tokens_in(m.seconds[0]), g.tokens_in(m.seconds[1]))
    shapes = itertools.cycle(m.shapes or (m.shape,))
    return tuple(
        draw_mask(draws.key(keys, "mask", view), g.grid, real, shape, m.ratio, m.size, size_t)
        for view, (real, shape) in enumerate(zip(columns, shapes, strict=False))
    )


def _background(keys: Tensor, views: int, augment: AugmentOptions) -> Tensor:
    """(V B,) share of power that the other clip has in each view: in one of a clip's views at most, so that no two have
    it in common."""
    drawn = draws.uniform(draws.key(keys, "mix"), 2)
    share = drawn[:, 1] * augment.mix_power * (drawn[:, 0] < augment.mix_prob)
    chosen = draws.integers(draws.key(keys, "mixed view"), views)
    return torch.cat([share * (chosen == view) for view in range(views)])
