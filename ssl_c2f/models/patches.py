"""Cutting a spectrogram into patches, and sine-cosine positions of the patches.

Legend: B batch, T frames, F mel bins, (F', T') grid, N = F' T' tokens (index f T' + t), P = patch_f patch_t values
of a patch (index f patch_t + t), D width. Patches overlap where the geometry's stride is less than its patch.
"""

from __future__ import annotations

import torch
from einops import rearrange
from lightly.models.utils import get_2d_sine_cosine_positional_embedding_from_grid
from torch import Tensor

from ssl_c2f.curriculum.geometry import Geometry


def patchify(spec: Tensor, geometry: Geometry) -> Tensor:
    """(B, T, F) -> (B, N, P): the real columns only, T = geometry.covered or more."""
    g = geometry
    if g.overlaps:
        cut = spec[:, : g.covered].unfold(1, g.patch_t, g.stride_t).unfold(2, g.patch_f, g.stride_f)
        return rearrange(cut, "b t f pt pf -> b (f t) (pf pt)")
    return rearrange(spec[:, : g.covered], "b (t pt) (f pf) -> b (f t) (pf pt)", pf=g.patch_f, pt=g.patch_t)


def unpatchify(patches: Tensor, geometry: Geometry) -> Tensor:
    """(B, N, P) -> (B, T, F), the inverse of `patchify` where patches do not overlap."""
    assert not geometry.overlaps
    return rearrange(
        patches, "b (f t) (pf pt) -> b (t pt) (f pf)", f=geometry.grid_f, pf=geometry.patch_f, pt=geometry.patch_t
    )


def real_values(num_frames: Tensor, geometry: Geometry) -> Tensor:
    """(B,) numbers of real frames -> (B, N, P) bool: which values of the patches come from real frames."""
    frames = torch.arange(geometry.covered, device=num_frames.device)
    real = (frames < num_frames[:, None])[..., None].expand(-1, -1, geometry.num_mels)
    return patchify(real, geometry)


def sincos_positions(geometry: Geometry, width: int) -> Tensor:
    """(N, D) sine-cosine embedding at the physical positions of the grid's real columns, exact for any geometry."""
    rows, columns = geometry.positions()
    grid = torch.stack(torch.meshgrid(rows, columns[: geometry.columns], indexing="ij"))
    table = get_2d_sine_cosine_positional_embedding_from_grid(embed_dim=width, grid=grid.numpy())
    return torch.as_tensor(table, dtype=torch.float32).reshape(geometry.num_tokens, width)
