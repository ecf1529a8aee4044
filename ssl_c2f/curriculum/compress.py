"""Temporal compression by pooling of the log-mel filterbank.

The other two methods need no code: `frame_shift` is a longer hop of the filterbank, `patch` a wider patch.
Axes: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def pool_time(spec: Tensor, num_frames: Tensor, kernel: int, kind: Literal["mean", "max"]) -> Tensor:
    """Pool `kernel` frames into one: (B, T, F) -> (B, ceil(T / kernel), F).

    Only the first `num_frames` (B,) frames of a clip, the real ones, are pooled, so a clip's result does not depend on
    its padding. Cells with nothing but padding are 0.
    """
    batch, time, mels = spec.shape
    padded = functional.pad(spec, (0, 0, 0, -time % kernel))
    cells = padded.reshape(batch, -1, kernel, mels)
    real = torch.arange(padded.shape[1], device=spec.device) < num_frames[:, None]
    real = real.view(batch, -1, kernel, 1)
    if kind == "mean":
        return cells.masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)
    return cells.masked_fill(~real, -torch.inf).amax(2).masked_fill(~real.any(2), 0)
