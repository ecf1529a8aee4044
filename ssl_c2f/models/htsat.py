"""The HTS-AT encoder: time folded into an image, and stages of timm's Swin blocks with ever fewer and wider tokens.

Chen, Du, Zhu, Ma, Berg-Kirkpatrick, Dubnov, "HTS-AT: A Hierarchical Token-Semantic Audio Transformer for Sound
Classification and Detection", ICASSP 2022 (arXiv 2202.00874), on Liu et al., "Swin Transformer", ICCV 2021. Its input
batch norm is replaced by the input statistics, its token-semantic head by `heads.py`.

Legend: B batch, (F', T') grid of N tokens, P values of a patch, (H, W) folded grid, D width of a stage, K final tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_c2f.core.options import Options
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry, stage_grid
from ssl_c2f.models.encoder import Encoder
from ssl_c2f.models.vit import initialise


class HTSATOptions(Options):
    """The hierarchical encoder: width, depth and heads for each stage. Defaults are the published sizes."""

    name: Literal["htsat"] = "htsat"
    widths: tuple[int, ...] = Field((96, 192, 384, 768), min_length=1, max_length=6)
    depths: tuple[int, ...] = Field((2, 2, 6, 2), min_length=1, max_length=6)
    heads: tuple[int, ...] = Field((4, 8, 16, 32), min_length=1, max_length=6)
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    patch_f: int = Field(4, ge=1, description="mel bins")
    patch_t: int = Field(4, ge=1, description="frames at time factor 1")
    window: int = Field(8, ge=1, description="tokens on a side that attend to each other; less in smaller grids")
    folds: int = Field(4, ge=1, le=64, description="bands that time is folded into, at most; a power of two")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate at the last block; it rises linearly with depth")

    @model_validator(mode="after")
    def _consistent(self) -> HTSATOptions:
        if not len(self.widths) == len(self.depths) == len(self.heads):
            raise ValueError("widths, depths and heads need one value for each stage")
        for width, depth, heads in zip(self.widths, self.depths, self.heads, strict=True):
            if min(width, depth, heads) < 1 or width % heads:
                raise ValueError(f"width {width} is no multiple of heads {heads}, or depth {depth} is less than 1")
            if width > 16384 or depth > 512:
                raise ValueError(f"width {width} is above 16384, or depth {depth} above 512")
        if self.folds & (self.folds - 1):
            raise ValueError(f"folds {self.folds} is no power of two")
        return self

    @property
    def width(self) -> int:
        """Of the output tokens."""
        return self.widths[-1]

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def merge(self) -> int:
        """Tokens on a side that become one from the first stage to the last."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def stride(self) -> tuple[int, int]:
        return self.patch_f, self.patch_t

    @property
    def fold(self) -> tuple[int, int]:
        return self.folds, self.merge

    def build(self, geometry: Geometry) -> HTSAT:
        return HTSAT(self, geometry)

    def costs(self, geometry: Geometry, tokens: int | None = None, passes: float = 3.0) -> list[cost.Part]:
        """Of the folded grid, padding included; no gradient flows into the spectrogram."""
        assert tokens is None, "windows need all tokens"
        height, width = geometry.folded
        embedding = cost.linear(height * width, geometry.patch_dim, self.widths[0])
        flops = 0.0
        for stage, (dim, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            grid = stage_grid(geometry, stage)
            area, (windowed, of_window) = grid[0] * grid[1], _windows(grid, self.window)
            if stage:
                flops += cost.linear(area, 4 * self.widths[stage - 1], dim)
            attention = cost.linear(windowed, dim, 4 * dim) + 2 * cost.linear(windowed, dim, of_window)
            flops += depth * (attention + 2 * cost.linear(area, dim, int(dim * self.mlp_ratio)))
        return [
            cost.Part("patch embedding", embedding, min(passes, 2.0)),
            cost.Part("encoder", flops, passes, geometry.num_tokens),
        ]

    def activation_bytes(self, geometry: Geometry, tokens: int, bytes_per_value: int = 4) -> float:
        """Each stage's tokens, and the attention scores, because these windows have no fused attention by default: the
        softmax's in fp32, and under autocast a copy for the product."""
        total = 0.0
        for stage, (dim, depth, heads) in enumerate(zip(self.widths, self.depths, self.heads, strict=True)):
            grid = stage_grid(geometry, stage)
            windowed, area = _windows(grid, self.window)
            total += cost.transformer_bytes(grid[0] * grid[1], dim, depth, self.mlp_ratio, bytes_per_value)
            total += (4 if bytes_per_value == 4 else 4 + bytes_per_value) * depth * heads * windowed * area
        return total


def fold(cells: Tensor, geometry: Geometry) -> Tensor:
    """(B, N, ...) -> (B, H, W, ...): consecutive stretches of W columns one above the other, zeros behind the last.

    Cell (r, w) is the token of mel row r mod F' and column t = (r // F') W + w: mel bins from (r mod F') patch_f on and
    frames from t patch_t on. Cutting patches first and folding them gives the same tokens as the published order,
    in which the spectrogram is folded and then cut.
    """
    g = geometry
    width = g.folded[1]
    batch, _, *rest = cells.shape
    x = cells.reshape(batch, *g.grid, *rest)
    x = torch.cat([x, x.new_zeros(batch, g.grid_f, g.folds * width - g.columns, *rest)], dim=2)
    return x.reshape(batch, g.grid_f, g.folds, width, *rest).transpose(1, 2).flatten(1, 2)


class HTSAT(Encoder):
    """Patch embedding, folding, stages of Swin blocks with tokens merged 2 x 2 between them, final norm.

    **Padding.** Frames after a clip's end, and columns that fill up the last band, are 0 after normalisation, which is
    the mean of the training set. Windows attend to them, so a short clip has the logits of a recording that goes on at
    the mean level up to the clip length; they do not depend on the other clips of the batch. Final tokens with nothing
    but padding are left out of the pooling (`real`).

    **Bands.** Merging never crosses the edge of a band. Windows do, where they are shifted or higher than a band, and
    then contain the same place of neighbouring bands, W columns apart, as published.
    """

    num_prefix = 0

    def __init__(self, options: HTSATOptions, geometry: Geometry) -> None:
        super().__init__()
        self.options, self.geometry, self.width = options, geometry, options.width
        self.layout = (geometry.folds, geometry.grid_f // geometry.merge)
        self.patch_embed = nn.Linear(geometry.patch_dim, options.widths[0])
        self.embed_norm = nn.LayerNorm(options.widths[0])
        self.blocks = nn.ModuleList()
        self.merges = nn.ModuleDict()  # by the number of the block that comes next
        for stage, (width, depth, heads) in enumerate(zip(options.widths, options.depths, options.heads, strict=True)):
            if stage:
                self.merges[str(len(self.blocks))] = PatchMerging(options.widths[stage - 1], width)
            grid = stage_grid(geometry, stage)
            for i in range(depth):
                rate = options.drop_path * len(self.blocks) / max(options.depth - 1, 1)
                shift = options.window // 2 if i % 2 else 0
                block = SwinTransformerBlock(
                    width, grid, heads, window_size=options.window, shift_size=shift, mlp_ratio=options.mlp_ratio,
                    drop_path=rate,
                )
                block.register_buffer("attn_mask", window_mask(grid, block.window_size, block.shift_size), False)
                self.blocks.append(block)
        self.norm = nn.LayerNorm(options.width)
        self.apply(initialise)

    def forward(self, patches: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """(B, N, P) -> (B, K, D) of the last stage, row by row. `valid` is not used: see "Padding" above."""
        x = self.embed_norm(self.patch_embed(fold(patches, self.geometry)))
        for i, block in enumerate(self.blocks):
            if str(i) in self.merges:
                x = self.merges[str(i)](x)
            x = block(x)
        tokens: Tensor = self.norm(x).flatten(1, 2)
        return tokens

    def real(self, valid: Tensor | None) -> Tensor | None:
        """(B, N) -> (B, K) bool: final tokens that cover something real. Where `valid` is None (no clip is short),
        (1, K) if the last band ends in tokens of nothing but padding, else None."""
        g = self.geometry
        if valid is None and g.folds * g.folded[1] - g.columns < g.merge:
            return None
        cells = torch.ones(1, g.num_tokens, device=self.norm.weight.device) if valid is None else valid.float()
        return F.max_pool2d(fold(cells, g)[:, None], g.merge).flatten(1) > 0


def window_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor | None:
    """(windows, tokens of a window, the same) to add to attention's scores; None where all may attend to all.

    A window that is shifted beyond an edge contains tokens of the opposite edge, which must not attend to those of this
    one. timm's own mask does the same where windows divide the grid; elsewhere it mixes opposite edges and lets tokens
    attend to the zeros that fill up windows.
    """
    parts = []
    for side, size, step in zip(grid, window, shift, strict=True):
        # after rolling: what comes from the opposite edge
        there = (torch.arange(side, device="cpu") + step) % side < step
        parts.append(F.pad(there.long(), (0, -side % size), value=2).view(-1, size))
    rows, columns = parts
    kinds = (3 * rows[:, None, :, None] + columns[None, :, None, :]).reshape(len(rows) * len(columns), -1)
    if not kinds.any():
        return None
    return torch.where(kinds[:, :, None] == kinds[:, None], 0.0, -100.0)


def _windows(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """Tokens of all windows, including those that timm pads with, and tokens of one window."""
    sides = [min(window, side) for side in grid]
    padded = [-(-side // part) * part for side, part in zip(grid, sides, strict=True)]
    return padded[0] * padded[1], sides[0] * sides[1]
