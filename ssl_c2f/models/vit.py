"""The ViT encoder: timm's blocks, over all tokens or over the kept ones alone.

Legend: B batch, N tokens, K kept tokens, P values of a patch, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_c2f.core.options import Options, UserError
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.models.encoder import Encoder
from ssl_c2f.models.heads import Layer
from ssl_c2f.models.patches import sincos_positions

Positions = Literal["sincos", "learned"]


class ViTOptions(Options):
    """The ViT encoder, and its patch at time factor 1 (phases may set their own)."""

    name: Literal["vit"] = "vit"
    width: int = Field(192, ge=4, le=16384)
    depth: int = Field(12, ge=1, le=512)
    heads: int = Field(3, ge=1, le=1024)
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    patch_f: int = Field(16, ge=1, description="mel bins")
    patch_t: int = Field(16, ge=1, description="frames at time factor 1")
    stride_f: int | None = Field(None, ge=1, description="mel bins to the next patch; less than patch_f: they overlap")
    stride_t: int | None = Field(None, ge=1, description="frames to the next patch at time factor 1")
    class_tokens: Literal[1, 2] = Field(1, description="2 as in AST and SSAST")
    positions: Positions = Field("sincos", description="sincos: exact in every geometry; learned: interpolated")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate at the last block; it rises linearly with depth")

    @model_validator(mode="after")
    def _divisible(self) -> ViTOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is no multiple of 4 (sine-cosine positions need that)")
        return self

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_f or self.patch_f, self.stride_t or self.patch_t

    @property
    def fold(self) -> tuple[int, int]:
        return 1, 1

    def build(self, geometry: Geometry) -> ViT:
        return ViT(self, geometry)

    def costs(self, geometry: Geometry, tokens: int | None = None, passes: float = 3.0) -> list[cost.Part]:
        """No gradient flows into the spectrogram. Class tokens have a cost, but are not counted as tokens."""
        kept = geometry.num_tokens if tokens is None else tokens
        embedding = cost.linear(kept, geometry.patch_dim, self.width)
        blocks = cost.transformer(kept + self.class_tokens, self.width, self.depth, self.mlp_ratio)
        return [
            cost.Part("patch embedding", embedding, min(passes, 2.0)), cost.Part("encoder", blocks, passes, kept),
        ]

    def activation_bytes(self, geometry: Geometry, tokens: int, bytes_per_value: int = 4) -> float:
        return cost.transformer_bytes(tokens, self.width, self.depth, self.mlp_ratio, bytes_per_value)


def blocks(width: int, depth: int, heads: int, mlp_ratio: float, drop_path: float = 0.0) -> nn.ModuleList:
    """Pre-norm transformer blocks as in ViT; LayerNorm eps 1e-6 like every published audio spectrogram transformer."""
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]

    def norm(dim: int, **kwargs: object) -> nn.LayerNorm:
        return nn.LayerNorm(dim, eps=1e-6, **kwargs)  # type: ignore[arg-type]

    return nn.ModuleList(
        Block(width, heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm)  # type: ignore[arg-type]
        for rate in rates
    )


def initialise(module: nn.Module) -> None:
    """Xavier-uniform linear layers and zero biases, as in MAE (He et al., CVPR 2022)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def attention_mask(valid: Tensor | None, prefix: int = 1) -> Tensor | None:
    """(B, K) bool -> (B, 1, 1, prefix + K) to add to attention scores: none attends to padding. None: there is none.

    Fused attention takes a bool mask too, but timm 1.0.20 without fused attention would add it as ones.
    """
    if valid is None:
        return None
    padding = ~nn.functional.pad(valid, (prefix, 0), value=True)[:, None, None]
    return torch.zeros(padding.shape, device=valid.device).masked_fill(padding, -torch.inf)


def position_table(geometry: Geometry, width: int, kind: Positions) -> Tensor:
    """(N, D): computed anew for each geometry (sincos), or a parameter that `transfer` interpolates (learned)."""
    if kind == "sincos":
        return sincos_positions(geometry, width)
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(geometry.num_tokens, width), std=0.02))


class ViT(Encoder):
    """Patch embedding, class tokens, positions, blocks, final norm. `num_prefix` tokens come before the patches'."""

    positions: Tensor

    def __init__(self, options: ViTOptions, geometry: Geometry) -> None:
        super().__init__()
        self.options, self.width, self.num_prefix = options, options.width, options.class_tokens
        self.layout = (1, geometry.grid_f)
        self.patch_embed = nn.Linear(geometry.patch_dim, options.width)
        self.cls_token = nn.Parameter(torch.empty(1, options.class_tokens, options.width).normal_(std=0.02))
        self.blocks = blocks(options.width, options.depth, options.heads, options.mlp_ratio, options.drop_path)
        self.norm = nn.LayerNorm(options.width, eps=1e-6)
        table = position_table(geometry, options.width, options.positions)
        if isinstance(table, nn.Parameter):
            self.positions = table
        else:
            self.register_buffer("positions", table, persistent=False)
        self.apply(initialise)

    def forward(
        self, patches: Tensor, kept: Tensor | None = None, valid: Tensor | None = None,
        hidden: tuple[Tensor, Tensor] | None = None, places: Tensor | None = None,
    ) -> Tensor:
        """(B, N, P) -> (V B, num_prefix + K, D), class tokens first; V views of a clip, 1 unless `kept` has more rows.

        Args:
            kept: (V B, K) indices of the tokens to encode, view after view; None: all. No other token is embedded.
            valid: (V B, K) bool, False where a token is padding; None: no token is.
            hidden: (B, N) bool, and the (1, 1, D) embedding that replaces these tokens; only where `kept` is None.
            places: (V B, K) where the kept tokens stand, if not in the grid that `kept` counts in.
        """
        x, mask = self.tokens(patches, kept, hidden, places), attention_mask(valid, self.num_prefix)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        encoded: Tensor = self.norm(x)
        return encoded

    def read(self, patches: Tensor, valid: Tensor | None, layer: Layer) -> Tensor:
        if layer == "last":
            return super().read(patches, valid, layer)
        if layer != "mean" and layer > len(self.blocks):
            raise UserError(f"layer {layer}: this encoder has {len(self.blocks)}")
        layers = self.layers(patches, valid)
        return torch.stack(layers).mean(0) if layer == "mean" else layers[layer - 1]

    def layers(self, patches: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """(B, N, P) -> the output (B, num_prefix + N, D) of each block, before the final norm."""
        x, mask, found = self.tokens(patches), attention_mask(valid, self.num_prefix), []
        for block in self.blocks:
            x = block(x, attn_mask=mask)
            found.append(x)
        return found

    def tokens(
        self, patches: Tensor, kept: Tensor | None = None, hidden: tuple[Tensor, Tensor] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """The input (V B, num_prefix + K, D) of the first block; arguments as for `forward`."""
        positions = self.positions
        if kept is not None:
            clips, size = len(patches), patches.shape[-1]
            index = kept.view(-1, clips, kept.shape[1], 1)  # (V, B, K, 1)
            views = patches.expand(len(index), -1, -1, -1)  # the same patches, not copies
            patches = views.gather(2, index.expand(-1, -1, -1, size)).flatten(0, 1)
            positions = positions[kept if places is None else places]
        x = self.patch_embed(patches)
        if hidden is not None:
            masked, embedding = hidden
            x = torch.where(masked[..., None], embedding.to(x.dtype), x)
        x = x + positions.to(patches.dtype)
        return torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

