"""Masked autoencoding: reconstruct the masked patches from the visible ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; for audio Huang et al., "Masked Autoencoders
that Listen", NeurIPS 2022. Legend: B batch, N tokens, K kept tokens, P values of a patch, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Shape
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.masks import num_masked
from ssl_c2f.models.decoder import Decoder, decoder_cost
from ssl_c2f.models.encoder import EncoderOptions
from ssl_c2f.models.patches import patchify, real_values
from ssl_c2f.models.vit import ViT, ViTOptions
from ssl_c2f.objectives.base import Objective, ObjectiveOptions, StepResult, pictures_of, vit


class MAEOptions(ObjectiveOptions):
    """The decoder is small: one of 8 x 512 would cost more than the encoder."""

    mask_shape: ClassVar[Shape] = "uniform"
    name: Literal["mae"] = "mae"
    decoder_width: int = Field(128, ge=4, le=16384, multiple_of=4)
    decoder_depth: int = Field(2, ge=0, le=512)
    decoder_heads: int = Field(4, ge=1, le=1024)
    norm_targets: bool = Field(False, description="normalise each target patch by its own mean and std")

    @model_validator(mode="after")
    def _whole_heads(self) -> MAEOptions:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(f"decoder_width {self.decoder_width} is no multiple of decoder_heads {self.decoder_heads}")
        return self

    def build(self, model: EncoderOptions, geometry: Geometry, num_classes: int) -> Objective:
        return MAE(vit(model), self, geometry)

    def costs(self, model: EncoderOptions, geometry: Geometry, mask_ratio: float, num_classes: int) -> list[cost.Part]:
        kept = geometry.num_tokens - num_masked(geometry.num_tokens, mask_ratio)
        decoder = decoder_cost(vit(model), self.decoder_width, self.decoder_depth, geometry, kept)
        return [*model.costs(geometry, kept), *decoder]


class MAE(Objective):
    """Encoder of the visible patches, decoder of all, mean squared error of the masked ones."""

    encoder: ViT

    def __init__(self, model: ViTOptions, options: MAEOptions, geometry: Geometry) -> None:
        super().__init__(model, geometry)
        self.options = options
        self.decoder = Decoder(model, options.decoder_width, options.decoder_depth, options.decoder_heads, geometry)

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions and targets, (B, N, P) each."""
        mask, patches = batch.masks[0], patchify(batch.spec, batch.geometry)
        encoded = self.encoder(patches, mask.kept, mask.kept_valid if batch.short else None)
        predictions = self.decoder(encoded, mask.kept, batch.valid)
        return predictions, self.targets(patches, batch)

    def targets(self, patches: Tensor, batch: Batch) -> Tensor:
        if not self.options.norm_targets:
            return patches
        return standardised(patches, real_values(batch.num_frames, batch.geometry))

    def forward(self, batch: Batch) -> StepResult:
        predictions, targets = self.predict(batch)
        weight = real_values(batch.num_frames, batch.geometry) & batch.masks[0].masked[..., None]
        error = (predictions.float() - targets).square() * weight
        count = weight.sum((1, 2)).clamp(min=1)  # a short clip may be a single token, which is never masked
        return StepResult((error.sum((1, 2)) / count).mean())

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Spectrograms (B, T, F): the input, its visible part (NaN elsewhere), and the reconstruction."""
        predictions, targets = self.predict(batch)
        masked = batch.masks[0].masked
        return pictures_of(batch, masked, torch.where(masked[..., None], predictions.float(), targets))


def standardised(patches: Tensor, real: Tensor) -> Tensor:
    """(B, N, P) with mean 0 and deviation 1 over the `real` (B, N, P) values of each patch."""
    weight = real.to(patches.dtype)
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    mean = (patches * weight).sum(-1, keepdim=True) / count
    variance = ((patches - mean).square() * weight).sum(-1, keepdim=True) / count
    return (patches - mean) / (variance + 1e-6).sqrt()
