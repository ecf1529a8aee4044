"""Reading a clip's features out of its tokens, and classifying them.

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
    """(B, prefix + K, D), class tokens first -> (B, D), or (B, 2 D) for mean_std. Padding (valid False) has no share.

    `class_token` is the mean of the class tokens, where there are two.

    Raises:
        UserError: there is none.
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
    """A linear classifier. `mean_pool` normalises the mean of the tokens, `class_token` takes that token (the encoder's
    final norm has seen it), `ast` normalises the mean of the class tokens (Gong et al., "AST", Interspeech 2021),
    `linear` standardises the mean feature without parameters of its own: the probe of a frozen encoder (LayerNorm in
    place of MAE's BatchNorm, so that a clip's logits never depend on its batch).

    Without classes it has no weights: what an encoder that was imported alone comes with."""

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
