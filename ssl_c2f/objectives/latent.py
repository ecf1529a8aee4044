"""Latent prediction: predict an EMA teacher's features of the masked tokens. The teacher sees the whole clip.

As in data2vec 2.0 (Baevski et al., ICML 2023, arXiv 2212.07525: several views per clip for one teacher's encoding,
inverse-block masks, targets averaged over layers), EAT (Chen et al., IJCAI 2024, arXiv 2401.03497: the clip-level loss)
and M2D (Niizumi et al., ICASSP 2023). Legend: B batch, V views, N tokens, K kept tokens, P values of a patch, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from lightly.utils.debug import std_of_l2_normalized
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Shape
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.masks import num_masked
from ssl_c2f.models.conv_decoder import ConvDecoder, conv_decoder_cost
from ssl_c2f.models.encoder import EncoderOptions
from ssl_c2f.models.heads import read_out
from ssl_c2f.models.patches import patchify
from ssl_c2f.models.vit import ViT, ViTOptions, initialise
from ssl_c2f.objectives.base import Objective, ObjectiveOptions, StepResult, vit


class LatentOptions(ObjectiveOptions):
    """The teacher is the encoder's moving average; its decay rises along the run."""

    mask_shape: ClassVar[Shape] = "inverse_block"
    name: Literal["latent"] = "latent"
    views: int = Field(4, ge=1, description="masked views of a clip; the teacher encodes it once for all")
    target_layers: int = Field(8, ge=1, description="the teacher's last blocks, whose outputs are averaged")
    clip_weight: float = Field(1.0, ge=0, description="weight of the clip-level loss")
    decay: tuple[float, float] = Field((0.999, 0.9999), description="the teacher's, at the start and after the ramp")
    decay_ramp: float = Field(0.3, gt=0, le=1, description="fraction of the run over which the decay rises")
    decoder_width: int = Field(128, ge=4, le=16384, multiple_of=4)
    decoder_depth: int = Field(6, ge=1, le=512)
    decoder_groups: int = Field(16, ge=1, description="of its convolutions; a divisor of its width")

    @field_validator("decay")
    @classmethod
    def _rising(cls, decay: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= decay[0] <= decay[1] <= 1:
            raise ValueError("the decay rises, from 0 or more to 1 or less")
        return decay

    @field_validator("decoder_groups")
    @classmethod
    def _dividing(cls, groups: int, info: ValidationInfo) -> int:
        if info.data.get("decoder_width", groups) % groups:
            raise ValueError(f"does not divide decoder_width {info.data['decoder_width']}")
        return groups

    @property
    def num_masks(self) -> int:
        return self.views

    def build(self, model: EncoderOptions, geometry: Geometry, num_classes: int) -> Objective:
        return Latent(vit(model), self, geometry)

    def costs(self, model: EncoderOptions, geometry: Geometry, mask_ratio: float, num_classes: int) -> list[cost.Part]:
        """The student for every view, and the teacher once, forward only."""
        kept = geometry.num_tokens - num_masked(geometry.num_tokens, mask_ratio)
        decoder = conv_decoder_cost(
            model.width, self.decoder_width, self.decoder_depth, self.decoder_groups, geometry, kept
        )
        return [
            cost.Part("teacher", cost.forward_flops(model.costs(geometry)), 1.0),
            *cost.times(self.views, model.costs(geometry, kept)),
            cost.Part("decoder", self.views * decoder),
            cost.Part("clip head", self.views * cost.linear(1, model.width, model.width)),
        ]


def teacher_decay(options: LatentOptions, u: float) -> float:
    """The EMA decay of the teacher at the fraction `u` of the run."""
    first, last = options.decay
    return first + (last - first) * min(u / options.decay_ramp, 1.0)


def instance_norm(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N, D) -> mean 0 and std 1 over the real tokens of each clip, channel by channel."""
    weight = torch.ones_like(x[..., :1]) if valid is None else valid[..., None].to(x.dtype)
    count = weight.sum(1, keepdim=True)
    mean = (x * weight).sum(1, keepdim=True) / count
    variance = ((x - mean).square() * weight).sum(1, keepdim=True) / count
    return (x - mean) * (variance + 1e-5).rsqrt()


class Latent(Objective):
    """Encoder of the visible tokens of each view, convolutional decoder of all tokens, teacher of the whole clip.

    The loss is the mean squared error of the predicted features of masked tokens, plus that of the clip's feature,
    which is predicted from the class token. All views share the teacher's encoding.
    """

    comparable_loss = False  # the teacher changes, and the targets with it
    encoder: ViT

    def __init__(self, model: ViTOptions, options: LatentOptions, geometry: Geometry) -> None:
        super().__init__(model, geometry)
        self.options = options
        self.teacher = ViT(model, geometry).requires_grad_(False)
        self.teacher.load_state_dict(self.encoder.state_dict())
        self.decoder = ConvDecoder(
            model.width, options.decoder_width, options.decoder_depth, options.decoder_groups, geometry
        )
        self.clip_head = nn.Linear(model.width, model.width)
        self.clip_head.apply(initialise)
        self.train()

    def train(self, mode: bool = True) -> Latent:
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, patches: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's encoding of whole clips, (B, N, P) -> targets of tokens (B, N, D) and of clips (B, D), and its
        features (B, D).

        A token's target is the mean of the last layers, each normalised over the clip. This removes the clip's mean, so
        the clip's target is the mean over layers and real tokens without that norm, normalised over its channels.
        """
        layers = self.teacher.layers(patches, valid)
        used = [layer.float() for layer in layers[-self.options.target_layers :]]
        tokens = torch.stack([instance_norm(x[:, self.teacher.num_prefix :], valid) for x in used]).mean(0)
        whole = read_out(torch.stack(used).mean(0), valid, "mean", self.teacher.num_prefix)
        features = read_out(self.teacher.norm(layers[-1]), valid, "mean", self.teacher.num_prefix)
        return tokens, F.layer_norm(whole, whole.shape[1:]), features.float()

    def forward(self, batch: Batch) -> StepResult:
        patches = patchify(batch.spec, batch.geometry)
        tokens, clips, features = self.targets(patches, batch.valid)
        kept = torch.cat([mask.kept for mask in batch.masks])  # (V B, K)
        masked = torch.cat([mask.masked for mask in batch.masks])
        short = torch.cat([mask.kept_valid for mask in batch.masks]) if batch.short else None
        encoded, prefix = self.encoder(patches, kept, short), self.encoder.num_prefix
        valid = None if batch.valid is None else batch.valid.repeat(self.options.views, 1)
        predicted = self.decoder(encoded[:, prefix:], kept, valid).float()
        error = (predicted - tokens.repeat(self.options.views, 1, 1)).square().mean(-1) * masked
        # a short clip may be a single token, which is never masked
        token_loss = (error.sum(1) / masked.sum(1).clamp(min=1)).mean()
        predicted_clips = self.clip_head(encoded[:, :prefix].mean(1)).float()
        clip_loss = (predicted_clips - clips.repeat(self.options.views, 1)).square().mean()
        return StepResult(token_loss + self.options.clip_weight * clip_loss, {
            "token_loss": token_loss.detach(), "clip_loss": clip_loss.detach(),
            "std_of_l2_normalized": spread_of(features),
        })

    @torch.no_grad()
    def after_step(self, u: float) -> None:
        """EMA update of the teacher."""
        decay = teacher_decay(self.options, u)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - decay)


def spread_of(features: Tensor) -> Tensor:
    """Std of the L2-normalised features of clips, (B, D) -> (): 0 is collapse, 1 / sqrt(D) random directions (Chen and
    He, CVPR 2021). NaN for a single clip."""
    if len(features) < 2:
        return features.new_tensor(torch.nan)
    spread: Tensor = std_of_l2_normalized(features)
    return spread
