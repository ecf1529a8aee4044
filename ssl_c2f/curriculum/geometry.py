"""The sizes of a phase: frames, patches and tokens at a time factor. No other file computes a size.

Legend: C time factor; T frames; F mel bins; (F', T') grid of tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_c2f.core.options import Options

Compression = Literal["frame_shift", "pool_mean", "pool_max", "patch"]
Count = TypeVar("Count", int, Tensor)


class AudioOptions(Options):
    """How a recording becomes a log-mel spectrogram at time factor 1."""

    sample_rate: int = Field(16000, ge=1000, le=768_000, description="Hz; recordings of other rates are resampled")
    clip_seconds: float = Field(10.0, gt=0, le=3600, description="longer recordings are cropped, shorter ones padded")
    num_mels: int = Field(128, ge=4, le=4096)
    f_min: float = Field(20.0, ge=0, description="Hz")
    f_max: float = Field(0.0, ge=0, description="Hz; 0 is the Nyquist frequency")
    hop_ms: float = Field(10.0, gt=0, le=10_000, description="frame shift")
    window_ms: float = Field(25.0, gt=0, le=1000)
    window: Literal["fixed", "grow"] = Field("fixed", description="grow: the window widens with the frame shift")

    @model_validator(mode="after")
    def _consistent(self) -> AudioOptions:
        nyquist = self.sample_rate / 2
        if not self.f_min < (self.f_max or nyquist) <= nyquist:
            raise ValueError(f"f_min {self.f_min:g} < f_max {self.f_max:g} <= {nyquist:g} Hz (half the rate) fails")
        if self.clip_seconds * 1000 < self.window_ms:
            raise ValueError(f"clip_seconds {self.clip_seconds:g} is shorter than one window of {self.window_ms:g} ms")
        if int(self.sample_rate * self.hop_ms / 1000) < 1:
            raise ValueError(f"hop_ms {self.hop_ms:g} is less than one sample at {self.sample_rate} Hz")
        if int(self.sample_rate * self.window_ms / 1000) < 2:
            raise ValueError(f"window_ms {self.window_ms:g} is less than two samples at {self.sample_rate} Hz")
        return self


def other_frequencies(before: AudioOptions, now: AudioOptions) -> str:
    """A line on mel rows that mean other frequencies than those that weights were trained on; empty if they do not."""
    was, new = (
        {"sample_rate": audio.sample_rate, "num_mels": audio.num_mels, "f_min": audio.f_min,
         "f_max": audio.f_max or audio.sample_rate / 2}
        for audio in (before, now)
    )
    changed = [f"audio.{name} {was[name]:g}, now {new[name]:g}" for name in was if was[name] != new[name]]
    if not changed:
        return ""
    return (f"note: the weights were trained with {'; '.join(changed)}: mel rows now mean other frequencies. With the "
            "values of the weights, recordings of any rate are resampled")


@dataclass(frozen=True)
class Geometry:
    """The sizes of one phase. Times are in samples, frequencies in Hz; frames are counted after compression.

    A column of the grid is real if any frame of a full-length clip falls into it. The columns after those make the
    grids of all phases equally long; no model computes them.
    """

    sample_rate: int
    clip_samples: int
    hop: int
    window: int
    num_mels: int
    f_min: float
    f_max: float
    num_frames: int  # padded: grid_t * patch_t, or more where patches overlap
    pool: int
    pool_kind: Literal["none", "mean", "max"]
    patch_f: int
    patch_t: int
    grid_f: int
    grid_t: int
    time_factor: int
    unit_mels: int  # positions are counted in patches of the fine phase: so many mel bins ...
    unit_samples: int  # ... and so many samples
    stride_f: int = 0  # mel bins from one patch to the next; 0 stands for patch_f: patches that do not overlap
    stride_t: int = 0  # frames
    folds: int = 1  # bands of consecutive time that HTS-AT stacks into an image, ...
    merge: int = 1  # ... whose tokens merge, so many on a side, into one of its last stage

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride_f", self.stride_f or self.patch_f)
        object.__setattr__(self, "stride_t", self.stride_t or self.patch_t)

    @cached_property
    def columns(self) -> int:
        """Real columns of tokens in a full-length clip."""
        return self.tokens_t(self.frames(self.clip_samples))

    @property
    def grid(self) -> tuple[int, int]:
        """(F', T') of the tokens that are computed."""
        return self.grid_f, self.columns

    @property
    def num_tokens(self) -> int:
        """Tokens of a full-length clip."""
        return self.grid_f * self.columns

    @property
    def folded(self) -> tuple[int, int]:
        """(H, W) of the columns folded into `folds` bands, one above the other; W is padded to a multiple of `merge`.

        Cell (r, w) holds row r mod F' of column (r // F') W + w: a band is a stretch of W columns, the earliest on top.
        """
        return self.grid_f * self.folds, _folded_width(self.columns, self.folds, self.merge)

    @property
    def patch_dim(self) -> int:
        return self.patch_f * self.patch_t

    @property
    def overlaps(self) -> bool:
        """Whether some values are in more than one patch."""
        return (self.stride_f, self.stride_t) != (self.patch_f, self.patch_t)

    @property
    def covered(self) -> int:
        """Frames that the real columns span; the last of them may be padding."""
        return self.patch_t + (self.columns - 1) * self.stride_t

    @property
    def hop_ms(self) -> float:
        return 1000 * self.hop / self.sample_rate

    @property
    def window_ms(self) -> float:
        return 1000 * self.window / self.sample_rate

    def raw_frames(self, num_samples: Count) -> Count:
        """Frames before pooling (Kaldi's snip_edges; a clip shorter than the window is padded to one frame)."""
        return 1 + _at_least(num_samples - self.window, 0) // self.hop

    def frames(self, num_samples: Count) -> Count:
        """Real frames of a clip of so many samples; a pooled frame is real if any frame in it is."""
        return -(-self.raw_frames(num_samples) // self.pool)

    def tokens_t(self, num_frames: Count) -> Count:
        """Real columns of tokens of a clip of so many real frames: as few as cover them all."""
        return _columns(num_frames, self.patch_t, self.stride_t)

    def tokens_in(self, seconds: float) -> int:
        """Columns of tokens that a length of time spans: the nearest number of them, at least one."""
        return max(1, round(seconds * self.sample_rate / (self.patch_t * self.crop_step)))

    def stretch(self, seconds: float) -> Geometry:
        """The geometry of a stretch of a clip: as many columns of tokens as span that long, every frame of them real.

        It spans the same time at every time factor, to the nearest column; its first column may stand behind any column
        of the clip that leaves room for the others.
        """
        assert not self.overlaps
        columns = min(self.tokens_in(seconds), self.columns)
        frames = columns * self.patch_t
        samples = self.window + (frames * self.pool - 1) * self.hop
        return replace(self, clip_samples=samples, num_frames=frames, grid_t=columns)

    @property
    def crop_step(self) -> int:
        """Crops start at multiples of this many samples, so that a crop's spectrogram is a crop of the spectrogram."""
        return self.hop * self.pool

    def positions(self) -> tuple[Tensor, Tensor]:
        """Centres of the grid's rows (F',) and of all its columns (T',), in patches of the fine phase.

        Column j at time factor C stands at C j + (C - 1) / 2: the mean of the fine columns that it covers. Patches that
        overlap stand closer together.
        """
        cpu = torch.device("cpu")  # also where a network is made without memory, to know its shapes
        rows = torch.arange(self.grid_f, device=cpu) * (self.stride_f / self.patch_f) + 0.5
        columns = torch.arange(self.grid_t, device=cpu) * (self.stride_t / self.patch_t) + 0.5
        span = self.patch_t * self.pool * self.hop / self.unit_samples
        return rows * (self.patch_f / self.unit_mels) - 0.5, columns * span - 0.5

    def digest(self) -> str:
        """A short name for all that spectrograms depend on. Input statistics are stored under it."""
        fields = ("sample_rate", "hop", "window", "num_mels", "f_min", "f_max", "pool", "pool_kind")
        text = json.dumps([getattr(self, f) for f in fields])
        return f"hop{self.hop}-pool{self.pool}{self.pool_kind}-" + hashlib.sha256(text.encode()).hexdigest()[:8]

    def to_dict(self) -> dict[str, int | float | str]:
        return asdict(self)


def _at_least(count: Count, low: int) -> Count:
    return max(count, low) if isinstance(count, int) else count.clamp(min=low)


def _columns(num_frames: Count, patch: int, stride: int) -> Count:
    return 1 + _at_least(-(-(num_frames - patch) // stride), 0)


def _folded_width(columns: int, folds: int, merge: int) -> int:
    return -(-columns // (folds * merge)) * merge


def _folds(grid_f: int, columns: int, most: int, merge: int) -> int:
    """The largest power of two, `most` or less, that leaves the image no higher than it is wide; at least 1."""
    folds = 1
    while 2 * folds <= most and grid_f * 2 * folds <= _folded_width(columns, 2 * folds, merge):
        folds *= 2
    return folds


def make_geometry(
    audio: AudioOptions, compression: Compression, patch: tuple[int, int], time_factor: int = 1, *, multiple: int = 1,
    unit: tuple[int, int] | None = None, stride: tuple[int, int] | None = None, fold: tuple[int, int] = (1, 1),
) -> Geometry:
    """The geometry of one phase.

    Args:
        patch: (mel bins, frames) of a patch at time factor 1.
        multiple: the padded clip is a multiple of so many fine frames, so that the grids of all phases agree.
        unit: the patch that positions are counted in; by default `patch`.
        stride: (mel bins, frames) from one patch to the next at time factor 1; by default `patch`. Where it is less,
            patches overlap, and the highest mel bins that fill no patch are left out (AST, Gong et al., Interspeech
            2021). The time factor widens patch and stride alike, whatever the compression.
        fold: bands that time is folded into at most, and the tokens on a side that become one (see `folded`). Short
            clips and coarse phases get fewer bands: as many as leave the image no higher than wide.

    Raises:
        ValueError: the patch does not divide the mel bins (or, where patches overlap, is higher than they are), the
            stride leaves gaps, or rows of patches cannot be merged without mixing bands.
    """
    (patch_f, patch_t), (unit_f, unit_t), (stride_f, stride_t) = patch, unit or patch, stride or patch
    if stride_f > patch_f or stride_t > patch_t:
        raise ValueError(f"stride {stride_f}x{stride_t} leaves gaps between patches of {patch_f}x{patch_t}")
    if audio.num_mels % patch_f if stride_f == patch_f else audio.num_mels < patch_f:
        raise ValueError(f"patch_f {patch_f} does not divide num_mels {audio.num_mels}")
    fine_hop = int(audio.sample_rate * audio.hop_ms / 1000)  # rounded down as Kaldi does
    fine_window = int(audio.sample_rate * audio.window_ms / 1000)
    clip = round(audio.clip_seconds * audio.sample_rate)
    padded = math.lcm(multiple, patch_t * time_factor)
    padded *= -(-(1 + max(clip - fine_window, 0) // fine_hop) // padded)

    shift = time_factor if compression == "frame_shift" else 1
    pool = time_factor if compression in ("pool_mean", "pool_max") else 1
    wider = time_factor if compression == "patch" else 1
    patch_t, stride_t = patch_t * wider, stride_t * wider
    hop, window = fine_hop * shift, fine_window * (shift if audio.window == "grow" else 1)
    columns = _columns(-(-(1 + max(clip - window, 0) // hop) // pool), patch_t, stride_t)
    num_frames = max(padded // (shift * pool), patch_t + (columns - 1) * stride_t)
    grid_f = (audio.num_mels - patch_f) // stride_f + 1
    if grid_f % fold[1]:
        raise ValueError(f"{grid_f} rows of patches of {patch_f} mel bins: merging them needs a multiple of {fold[1]}")
    return Geometry(
        sample_rate=audio.sample_rate, clip_samples=clip, hop=hop, window=window,
        num_mels=audio.num_mels, f_min=audio.f_min, f_max=audio.f_max or audio.sample_rate / 2,
        num_frames=num_frames, pool=pool,
        pool_kind="none" if pool == 1 else "mean" if compression == "pool_mean" else "max",
        patch_f=patch_f, patch_t=patch_t, grid_f=grid_f,
        grid_t=(num_frames - patch_t) // stride_t + 1, time_factor=time_factor, unit_mels=unit_f,
        unit_samples=unit_t * fine_hop, stride_f=stride_f, stride_t=stride_t,
        folds=_folds(grid_f, columns, *fold), merge=fold[1],
    )


def stage_grid(geometry: Geometry, stage: int) -> tuple[int, int]:
    """(H, W) of a stage, the first being 0."""
    height, width = geometry.folded
    return height >> stage, width >> stage


def make_geometries(
    audio: AudioOptions, compression: Compression, patch: tuple[int, int],
    phases: Sequence[tuple[int, tuple[int, int] | None]], stride: tuple[int, int] | None = None,
    fold: tuple[int, int] = (1, 1),
) -> list[Geometry]:
    """One geometry per (time factor, patch or None for `patch`), all padded to the same span.

    Where a `stride` makes patches overlap, a last column may reach beyond that span.
    """
    multiple = math.lcm(patch[1], *((own or patch)[1] * factor for factor, own in phases))
    return [
        make_geometry(
            audio, compression, own or patch, factor, multiple=multiple, unit=patch, stride=own or stride, fold=fold
        )
        for factor, own in phases
    ]
