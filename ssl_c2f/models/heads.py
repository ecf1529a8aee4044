"""Pooling the tokens of a clip into one feature vector, and classification heads.

Legend: B batch, K tokens, D width, R frequency rows of the tokens, C classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from ssl_c2f.core.options import UserError

Readout = Literal["mean", "mean_std", "bands", "bands_std", "class_token"]
Layer = Literal["last", "mean"] | Annotated[int, Field(ge=1)]  # after the final norm; mean of all blocks; one block
HeadKind = Literal["mean_pool", "bands", "class_token", "ast", "linear"]


def read_out(
    tokens: Tensor, valid: Tensor | None, kind: Readout, prefix: int, layout: tuple[int, int] = (1, 1)
) -> Tensor:
    """(B, prefix + K, D), class tokens first -> a clip's features. Padding (valid False) is left out.

    `mean` is (B, D), over all tokens; `bands` is (B, R D): the mean over time for each frequency row, rows one after
    another, as M2D and MSM-MAE are read (Niizumi et al., "Masked Modeling Duo", ICASSP 2023): a mean over all tokens
    loses which frequency a token stands for. `mean_std` and `bands_std` are twice as wide: the deviations follow.
    `class_token` is the mean of the class tokens, where there are two.

    Args:
        layout: (bands of time, R): token ((band R + row) columns + column).

    Raises:
        UserError: the encoder has no class token.
    """
    if kind == "class_token":
        if not prefix:
            raise UserError("this encoder has no class token to read; take the mean of its tokens instead")
        return tokens[:, :prefix].mean(1)
    x = tokens[:, prefix:]
    weight = torch.ones_like(x[..., :1]) if valid is None else valid[..., None].to(x.dtype)
    if kind.startswith("bands"):  # every row as if it were a clip of its own
        weight = weight.expand(x.shape[0], -1, -1)
        x, weight = (rearrange(v, "b (t r c) d -> (b r) (t c) d", t=layout[0], r=layout[1]) for v in (x, weight))
    count = weight.sum(1)
    mean = (x * weight).sum(1) / count
    parts = [mean]
    if kind.endswith("std"):
        variance = ((x - mean[:, None]).square() * weight).sum(1) / count
        parts.append(variance.clamp(min=1e-12).sqrt())
    if kind.startswith("bands"):
        parts = [rearrange(part, "(b r) d -> b (r d)", r=layout[1]) for part in parts]
    return torch.cat(parts, dim=-1)


class Head(nn.Module):
    """A linear classifier on a normalised feature vector. `mean_pool`: LayerNorm of the mean token. `bands`: LayerNorm
    of the means of all frequency rows (see `read_out`). `class_token`: that token, which the encoder's final norm has
    normalised. `ast`: LayerNorm of the mean of the class tokens (Gong et al., "AST", Interspeech 2021). `linear`: the
    probe of a frozen encoder, a LayerNorm without parameters of the mean token (in place of MAE's BatchNorm, so that a
    clip's logits do not depend on its batch).

    With no classes it has no weights: for encoders that were imported without a classifier."""

    def __init__(
        self, kind: HeadKind, width: int, num_classes: int, prefix: int, layout: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.readout: Readout = "bands" if kind == "bands" else "mean"
        if kind in ("class_token", "ast"):
            self.readout = "class_token"
        self.prefix, self.layout = prefix, layout
        width *= layout[1] if kind == "bands" else 1
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
        logits: Tensor = self.classifier(self.features(tokens, valid))
        return logits

    def features(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """(B, prefix + K, D) -> what the linear layer gets."""
        found: Tensor = self.norm(read_out(tokens, valid, self.readout, self.prefix, self.layout))
        return found
