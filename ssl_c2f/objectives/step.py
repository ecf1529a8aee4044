"""What every objective gives back, and what masked ones share.

Legend: B batch, T frames, F mel bins, N tokens, P values of a patch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssl_c2f.data.front_end import Batch
from ssl_c2f.models.heads import Readout, read_out
from ssl_c2f.models.patches import patchify, unpatchify
from ssl_c2f.models.vit import Encoder


@dataclass(frozen=True)
class StepResult:
    """The mean loss over the batch's clips (each weighs the same, however long it is) and named means beside it."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def features_of(encoder: Encoder, batch: Batch, kind: Readout) -> Tensor:
    """(B, D) features of whole clips ((B, 2 D) for mean_std)."""
    tokens = encoder(patchify(batch.spec, batch.geometry), valid=batch.valid)
    return read_out(tokens, batch.valid, kind, encoder.num_prefix)


def pictures_of(batch: Batch, masked: Tensor, reconstruction: Tensor | None = None) -> dict[str, Tensor]:
    """Spectrograms (B, T, F): the input, what of it is not `masked` (B, N) with NaN elsewhere, and, given as patches
    (B, N, P), the reconstruction."""
    patches = patchify(batch.spec, batch.geometry)
    views = {"input": patches, "kept": patches.masked_fill(masked[..., None], torch.nan)}
    if reconstruction is not None:
        views["reconstruction"] = reconstruction
    return {name: unpatchify(view, batch.geometry) for name, view in views.items()}
