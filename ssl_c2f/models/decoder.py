"""The small transformer decoder of masked autoencoding: from the visible tokens to the values of all patches.

Legend: B batch, N tokens, K kept tokens, P values of a patch, D the encoder's width, E the decoder's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.models.vit import ViTOptions, attention_mask, blocks, initialise, position_table


def fill_gaps(tokens: Tensor, kept: Tensor, mask_token: Tensor, positions: Tensor) -> Tensor:
    """(B, K, E) tokens at the places `kept` (B, K) -> (B, N, E): mask tokens elsewhere, positions (N, E) added."""
    gaps = mask_token.to(tokens.dtype).expand(len(tokens), len(positions), -1)
    return gaps.scatter(1, kept[..., None].expand_as(tokens), tokens) + positions.to(tokens.dtype)


class Decoder(nn.Module):
    """Mask tokens at the masked places, positions, transformer blocks, and a linear head for each patch."""

    positions: Tensor

    def __init__(self, encoder: ViTOptions, width: int, depth: int, heads: int, geometry: Geometry) -> None:
        super().__init__()
        self.num_prefix = encoder.class_tokens
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.blocks = blocks(width, depth, heads, encoder.mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_patch = nn.Linear(width, geometry.patch_dim)
        self.register_buffer("positions", position_table(geometry, width, "sincos"), persistent=False)
        self.apply(initialise)

    def forward(self, tokens: Tensor, kept: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, num_prefix + K, D) encoded tokens -> (B, N, P) predictions.

        Args:
            kept: (B, K) places of the encoded tokens.
            valid: (B, N) bool, False where a token is padding; None if none is.
        """
        x = self.embed(tokens)
        cls, x = x[:, : self.num_prefix], x[:, self.num_prefix :]
        x = fill_gaps(x, kept, self.mask_token, self.positions)
        x, mask = torch.cat([cls, x], dim=1), attention_mask(valid, self.num_prefix)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        patches: Tensor = self.to_patch(self.norm(x[:, self.num_prefix :]))
        return patches


def decoder_cost(
    encoder: ViTOptions, width: int, depth: int, geometry: Geometry, kept: int, passes: float = 3.0
) -> list[cost.Part]:
    tokens, prefix = geometry.num_tokens, encoder.class_tokens
    body = cost.linear(kept + prefix, encoder.width, width)
    body += cost.transformer(tokens + prefix, width, depth, encoder.mlp_ratio)
    return [cost.Part("decoder", body + cost.linear(tokens, width, geometry.patch_dim), passes)]
