"""The convolutional decoder of latent prediction: from the visible tokens to the teacher's features of all tokens.

As in data2vec 2.0 (Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations",
ICML 2023, section 3.3) and EAT (Chen et al., IJCAI 2024): grouped 3 x 3 convolutions over the grid, each with a norm,
GELU and a residual. Masked tokens are one learned embedding (noise in data2vec), and positions are added, since mel
rows differ. Legend: B batch, N tokens, K kept tokens, D the encoder's width, E the decoder's, (F', T') grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.models.decoder import fill_gaps
from ssl_c2f.models.vit import initialise, position_table

_KERNEL = 3


class ConvDecoder(nn.Module):
    """Mask tokens at the masked places, positions, convolutions over the grid, and a linear layer for each token."""

    positions: Tensor

    def __init__(self, encoder_width: int, width: int, depth: int, groups: int, geometry: Geometry) -> None:
        super().__init__()
        self.grid, self.width = geometry.grid, width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=groups) for _ in range(depth)
        )
        self.to_token = nn.Linear(width, encoder_width)
        self.register_buffer("positions", position_table(geometry, width, "sincos"), persistent=False)
        self.apply(initialise)

    def forward(self, tokens: Tensor, kept: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, K, D) encoded tokens -> (B, N, D) predictions.

        Args:
            kept: (B, K) places of the encoded tokens.
            valid: (B, N) bool, False where a token is padding; None if none is.
        """
        x = self.embed(tokens)
        x = fill_gaps(x, kept, self.mask_token, self.positions)
        x = x.mT.reshape(len(x), self.width, *self.grid)
        real = None if valid is None else valid.view(-1, 1, *self.grid)
        for conv in self.convs:
            y = conv(x if real is None else x * real)  # zeros after a clip's end, as at the grid's edge
            y = F.layer_norm(y.movedim(1, -1), (self.width,)).movedim(-1, 1)
            x = x + F.gelu(y)
        predicted: Tensor = self.to_token(x.flatten(2).mT)
        return predicted


def conv_decoder_cost(encoder_width: int, width: int, depth: int, groups: int, geometry: Geometry, kept: int) -> float:
    """FLOPs of one forward pass for one view."""
    convs = depth * cost.linear(geometry.num_tokens, _KERNEL**2 * width // groups, width)
    return cost.linear(kept, encoder_width, width) + convs + cost.linear(geometry.num_tokens, width, encoder_width)
