"""Reading a clip's features out of its tokens, and classifying them.

Legend: B batch, K tokens, D width, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Readout = Literal["mean", "mean_std", "class_token"]
HeadKind = Literal["mean_pool", "class_token", "linear"]


def read_out(tokens: Tensor, valid: Tensor | None, kind: Readout) -> Tensor:
    """(B, 1 + K, D), class token first -> (B, D), or (B, 2 D) for mean_std. Padding (valid False) has no share."""
    if kind == "class_token":
        return tokens[:, 0]
    x = tokens[:, 1:]
    weight = torch.ones_like(x[..., :1]) if valid is None else valid[..., None].to(x.dtype)
    count = weight.sum(1)
    mean = (x * weight).sum(1) / count
    if kind == "mean":
        return mean
    variance = ((x - mean[:, None]).square() * weight).sum(1) / count
    return torch.cat([mean, variance.clamp(min=1e-12).sqrt()], dim=-1)


class Head(nn.Module):
    """A linear classifier. `mean_pool` normalises the mean of the tokens, `class_token` takes that token (the encoder's
    final norm has seen it), `linear` standardises the mean feature without parameters of its own: the probe of a frozen
    encoder (LayerNorm in place of MAE's BatchNorm, so that a clip's logits never depend on its batch)."""

    def __init__(self, kind: HeadKind, width: int, num_classes: int) -> None:
        super().__init__()
        self.readout: Readout = "class_token" if kind == "class_token" else "mean"
        self.norm = nn.Identity() if kind == "class_token" else nn.LayerNorm(width, elementwise_affine=kind != "linear")
        self.classifier = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """(B, 1 + K, D) -> logits (B, C)."""
        logits: Tensor = self.classifier(self.norm(read_out(tokens, valid, self.readout)))
        return logits
