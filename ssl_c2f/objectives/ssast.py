"""SSAST: classify each masked patch among those of its clip (InfoNCE), and reconstruct it.

Gong et al., "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022, section 2.3 (equations 1 to 3), and its
published code, github.com/YuanGongND/ssast. Legend: B batch, N tokens, M masked tokens, P values of a patch, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Shape
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.masks import Mask, num_masked
from ssl_c2f.models.encoder import EncoderOptions
from ssl_c2f.models.patches import patchify, real_values
from ssl_c2f.models.vit import ViT, ViTOptions, initialise
from ssl_c2f.objectives.base import Objective, ObjectiveOptions, StepResult, pictures_of, vit

Softmax = Literal["targets", "predictions"]


class SSASTOptions(ObjectiveOptions):
    """The published code does `passes: two`, `softmax: predictions` and `mask.shape=one_way_cluster`; the defaults are
    cheaper and without its faults."""

    mask_shape: ClassVar[Shape] = "cluster"
    name: Literal["ssast"] = "ssast"
    passes: Literal["one", "two"] = Field("one", description="two: a pass and a mask of its own for each loss")
    softmax: Softmax = Field("targets", description="targets: for each prediction, over the clip's masked patches")
    mse_weight: float = Field(10.0, ge=0)

    @property
    def num_masks(self) -> int:
        return 2 if self.passes == "two" else 1

    def build(self, model: EncoderOptions, geometry: Geometry, num_classes: int) -> Objective:
        return SSAST(vit(model), self, geometry)

    def costs(self, model: EncoderOptions, geometry: Geometry, mask_ratio: float, num_classes: int) -> list[cost.Part]:
        masked, patch = num_masked(geometry.num_tokens, mask_ratio), geometry.patch_dim
        one = cost.linear(masked, model.width, model.width) + cost.linear(masked, model.width, patch)
        return [  # every token runs through the encoder, in each pass
            *cost.times(self.num_masks, model.costs(geometry)), cost.Part("heads", 2 * one),
            cost.Part("similarities", cost.linear(masked, patch, masked), 2.0),  # no gradient flows into the targets
        ]


@dataclass(frozen=True)
class Matches:
    """How well predictions identify their own patch, a value for each clip (B,)."""

    nce: Tensor  # InfoNCE, in nats
    accuracy: Tensor
    count: Tensor  # K, the patches to choose from: at chance, nce is ln K and accuracy 1 / K


def match(predictions: Tensor, targets: Tensor, valid: Tensor, softmax: Softmax = "targets") -> Matches:
    """InfoNCE over the masked patches of each clip (SSAST, equation 1).

    Args:
        predictions: (B, M, P).
        targets: (B, M, P); the similarity of a prediction and a target is their dot product.
        valid: (B, M) bool, False for rows that fill up short clips.
        softmax: over the targets for each prediction, or over the predictions for each target, as SSAST's code does;
            the accuracy is then that of the target in whose softmax a prediction has the largest probability.
    """
    with torch.autocast(targets.device.type, enabled=False):  # sums over P values of a softmax's exponents
        scores = predictions.float() @ targets.float().mT  # (B, prediction, target)
    pairs = valid[:, :, None] & valid[:, None, :]
    scores = scores.masked_fill(~pairs, -1e30)  # finite, since rows of padding contain nothing else
    log_probability = scores.log_softmax(2 if softmax == "targets" else 1)
    count = valid.sum(1)
    own = torch.arange(valid.shape[1], device=valid.device)
    right = (log_probability.masked_fill(~pairs, -torch.inf).argmax(2) == own) & valid
    nce = -log_probability.diagonal(dim1=1, dim2=2).masked_fill(~valid, 0.0).sum(1)
    return Matches(nce / count.clamp(min=1), right.sum(1) / count.clamp(min=1), count)


def squared_error(predictions: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """(B, M, P) each, `weight` of 0 and 1 -> (B,) mean squared error (SSAST, equation 2)."""
    error = (predictions.float() - targets).square() * weight
    return error.sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def head(width: int, patch_dim: int, last: Literal["to_match", "to_patch"]) -> nn.Sequential:
    """Linear, ReLU, linear, (..., D) -> (..., P). The last layer is named for its output, the patch or what a patch is
    multiplied with: `transfer` resizes its rows accordingly where the patch changes."""
    layers = {"hidden": nn.Linear(width, width), "relu": nn.ReLU(), last: nn.Linear(width, patch_dim)}
    return nn.Sequential(OrderedDict(layers)).apply(initialise)


class SSAST(Objective):
    """Encoder of all tokens, with masked ones replaced by one learned embedding, and a head for each loss.

    In published weights, `encoder` is `v`, `mask_token` is `mask_embed`, `match_head` is `cpredlayer`
    and `draw_head` is `gpredlayer`, with `.hidden` for `.0` and `.to_match` or `.to_patch` for `.2`.
    """

    encoder: ViT

    def __init__(self, model: ViTOptions, options: SSASTOptions, geometry: Geometry) -> None:
        super().__init__(model, geometry)
        self.options = options
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.width).normal_(std=0.02))
        self.match_head = head(model.width, geometry.patch_dim, "to_match")
        self.draw_head = head(model.width, geometry.patch_dim, "to_patch")

    def encode(self, patches: Tensor, mask: Mask, batch: Batch) -> Tensor:
        """(B, N, P) -> (B, N, D), with masked patches replaced."""
        encoded: Tensor = self.encoder(patches, valid=batch.valid, hidden=(mask.masked, self.mask_token))
        return encoded[:, self.encoder.num_prefix :]

    def forward(self, batch: Batch) -> StepResult:
        patches, real = patchify(batch.spec, batch.geometry), real_values(batch.num_frames, batch.geometry)
        first, last = batch.masks[0], batch.masks[-1]
        tokens = self.encode(patches, first, batch)
        index, valid = masked_tokens(first)
        found = match(self.match_head(take(tokens, index)), take(patches, index), valid, self.options.softmax)
        if self.options.passes == "two":
            tokens = self.encode(patches, last, batch)
            index, valid = masked_tokens(last)
        weight = take(real, index) & valid[..., None]
        mse = squared_error(self.draw_head(take(tokens, index)), take(patches, index), weight).mean()
        nce = found.nce.mean()
        count = found.count.clamp(min=1).float()
        return StepResult(nce + self.options.mse_weight * mse, {
            "nce": nce.detach(), "nce_accuracy": found.accuracy.mean(), "mse": mse.detach(),
            "nce_k": count.mean(), "nce_chance": count.log().mean(),
        })

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Spectrograms (B, T, F): the input, its visible part (NaN elsewhere), and the reconstruction."""
        patches, mask = patchify(batch.spec, batch.geometry), batch.masks[-1]
        predicted = self.draw_head(self.encode(patches, mask, batch)).float()
        return pictures_of(batch, mask.masked, torch.where(mask.masked[..., None], predicted, patches))


def masked_tokens(mask: Mask) -> tuple[Tensor, Tensor]:
    """(B, M) indices of the masked tokens, ascending, M as in a full-length clip; and (B, M) bool, False where a
    shorter clip has no more of them."""
    most = mask.masked.shape[1] - mask.kept.shape[1]
    index = mask.masked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, mask.masked.gather(1, index)


def take(values: Tensor, index: Tensor) -> Tensor:
    """(B, N, X) at (B, M) -> (B, M, X)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
