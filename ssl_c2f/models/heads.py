"""Pooling the tokens of a clip into one feature vector, and classification heads.

Legend: B batch, K tokens, D width, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ssl_c2f.core.options import UserError

Readout = Literal["mean", "mean_std", "class_token"]
HeadKind = Literal["mean_pool", "class_token", "ast", "linear"]


def read_out(tokens: Tensor, valid: Tensor | None, kind: Readout, prefix: int) -> Tensor:
    """(B, prefix + K, D), class tokens first -> (B, D), or (B, 2 D) for mean_std. Padding (valid False) is left out.

    `class_token` is the mean of the class tokens, where there are two.

    Raises:
        UserError: the encoder has no class token.
    """
    if kind == "class_token":
        if not prefix:
            raise UserError("this encoder has no class token to read; take the mean of its tokens instead")
        return tokens[:, :prefix].mean(1)
    x = tokens[:, prefix:]
    weight = torch.ones_like(x[..., :1]) if valid is None else valid[..., None].to(x.dtype)
    count = weight.sum(1)
    mean = (x * weight).sum(1) / count
    if kind == "mean":
        return mean
    variance = ((x - mean[:, None]).square() * weight).sum(1) / count
    return torch.cat([mean, variance.clamp(min=1e-12).sqrt()], dim=-1)


class Head(nn.Module):
    """A linear classifier on a normalised feature vector. `mean_pool`: LayerNorm of the mean token. `class_token`: that
    token, which the encoder's final norm has normalised. `ast`: LayerNorm of the mean of the class tokens (Gong et al.,
    "AST", Interspeech 2021). `linear`: the probe of a frozen encoder, a LayerNorm without parameters of the mean token
    (in place of MAE's BatchNorm, so that a clip's logits do not depend on its batch).

    With no classes it has no weights: for encoders that were imported without a classifier."""

    def __init__(self, kind: HeadKind, width: int, num_classes: int, prefix: int) -> None:
        super().__init__()
        self.readout: Readout = "class_token" if kind in ("class_token", "ast") else "mean"
        self.prefix = prefix
        self.norm: nn.Module = nn.Identity()
        self.classifier: nn.Module = nn.Identity()
        if not num_classes:
            return
        if kind != "class_token":
            self.norm = nn.LayerNorm(width, elementwise_affine=kind != "linear")
        self.classifier = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """(B, prefix + K, D) -> logits (B, C)."""
        logits: Tensor = self.classifier(self.norm(read_out(tokens, valid, self.readout, self.prefix)))
        return logits
