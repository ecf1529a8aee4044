"""Views: two stretches of a clip, each changed and partly masked, are told to be the same sound among all others.

SimCLR for audio (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020;
Saeed et al., "COLA", ICASSP 2021) of masked views, which cost half (AudioMosaic, ICML 2026), with a thin decoder that
reconstructs what was masked (He et al., MAE, CVPR 2022). In place of InfoNCE, VICReg (Bardes et al., ICLR 2022) needs
no other clips to tell apart. Legend: B clips, V views of each, N tokens of a view, K kept tokens, P values of a patch,
D width, E width of the projections.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_c2f.core import draws
from ssl_c2f.core.distributed import all_rows
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Shape
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.masks import Mask, num_masked
from ssl_c2f.models.decoder import Decoder, decoder_cost
from ssl_c2f.models.encoder import EncoderOptions
from ssl_c2f.models.heads import read_out
from ssl_c2f.models.patches import patchify, real_values
from ssl_c2f.models.vit import ViT, ViTOptions, initialise
from ssl_c2f.objectives.base import Objective, ObjectiveOptions, StepResult, pictures_of, vit
from ssl_c2f.objectives.mae import standardised


class ViewsOptions(ObjectiveOptions):
    """What a view may change is set by `augment` (stretch, gain, tilt, mix): features come to ignore exactly that."""

    whole_batch: ClassVar[bool] = True
    name: Literal["views"] = "views"
    views: int = Field(2, ge=2, description="of each clip")
    seconds: float = Field(2.56, gt=0, description="length of a view, in whole columns of tokens; about half a clip")
    shapes: tuple[Shape, ...] = Field((), description="of the masks of the views in turn; none: the phase's for all")
    contrast: Literal["infonce", "vicreg"] = Field("infonce", description="vicreg: without other clips as negatives")
    temperature: float = Field(0.2, gt=0, description="of InfoNCE")
    hidden: int = Field(256, ge=1, description="width of the projector's hidden layer")
    projection: int = Field(128, ge=1, description="width of what is compared")
    reconstruction: float = Field(1.0, ge=0, description="weight of the masked patches' error; 0: no decoder")
    decoder_width: int = Field(64, ge=4, multiple_of=4)
    decoder_depth: int = Field(1, ge=0)
    decoder_heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _whole_heads(self) -> ViewsOptions:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(f"decoder_width {self.decoder_width} is no multiple of decoder_heads {self.decoder_heads}")
        return self

    def seen(self, geometry: Geometry) -> Geometry:
        return geometry.stretch(self.seconds)

    @property
    def num_masks(self) -> int:
        return self.views

    def build(self, model: EncoderOptions, geometry: Geometry, num_classes: int) -> Objective:
        return Views(vit(model), self, geometry)

    def costs(self, model: EncoderOptions, geometry: Geometry, mask_ratio: float, num_classes: int) -> list[cost.Part]:
        """Comparing the projections is not counted: it is below 1 % of the step."""
        seen = self.seen(geometry)
        kept = seen.num_tokens - num_masked(seen.num_tokens, mask_ratio)
        projector = cost.linear(1, model.width, self.hidden) + cost.linear(1, self.hidden, self.projection)
        parts = [*model.costs(seen, kept), cost.Part("projector", projector)]
        if self.reconstruction:
            parts += decoder_cost(vit(model), self.decoder_width, self.decoder_depth, seen, kept)
        return cost.times(self.views, parts)


class Views(Objective):
    """Encoder of what each view keeps, projector of its mean, decoder of its masked patches.

    A view's columns stand at a random place of the clip's, so that the encoder knows all positions of a whole clip and
    its features do not depend on where a sound begins.
    """

    comparable_loss = False  # it depends on what is in the batch

    encoder: ViT

    def __init__(self, model: ViTOptions, options: ViewsOptions, geometry: Geometry) -> None:
        super().__init__(model, geometry)
        self.options = options
        self.projector = nn.Sequential(
            nn.Linear(model.width, options.hidden), nn.GELU(), nn.Linear(options.hidden, options.projection)
        ).apply(initialise)
        self.decoder: Decoder | None = None
        if options.reconstruction:
            self.decoder = Decoder(
                model, options.decoder_width, options.decoder_depth, options.decoder_heads, options.seen(geometry)
            )

    def encode(self, batch: Batch, mask: Mask) -> tuple[Tensor, Tensor]:
        """Patches of the views (V B, N, P) and encoded tokens (V B, num_prefix + K, D)."""
        patches, g = patchify(batch.spec, batch.geometry), batch.geometry
        views = len(patches) // len(batch.keys)
        keys = torch.cat([draws.key(batch.keys, "place", view) for view in range(views)])
        first = draws.integers(keys, self.geometry.columns - g.columns + 1)[:, None]
        row, column = mask.kept // g.columns, mask.kept % g.columns
        places = row * self.geometry.columns + column + first
        valid = mask.kept_valid if batch.short else None
        return patches, self.encoder(patches, mask.kept, valid, places=places)

    def forward(self, batch: Batch) -> StepResult:
        mask = joined(batch.masks)
        patches, tokens = self.encode(batch, mask)
        pooled = read_out(tokens, mask.kept_valid if batch.short else None, "mean", self.encoder.num_prefix)
        projections = self.projector(pooled).float().view(self.options.views, -1, self.options.projection)
        loss, metrics = (info_nce if self.options.contrast == "infonce" else vicreg)(projections, self.options)
        if self.decoder is not None:
            predictions = self.decoder(tokens, mask.kept, mask.valid if batch.short else None)
            real = real_values(batch.num_frames, batch.geometry)
            error = (predictions.float() - standardised(patches, real)).square() * (real & mask.masked[..., None])
            count = (real & mask.masked[..., None]).sum((1, 2)).clamp(min=1)
            mse = (error.sum((1, 2)) / count).mean()
            metrics["mse"] = mse.detach()
            loss = loss + self.options.reconstruction * mse
        return StepResult(loss, metrics)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Spectrograms (V B, T, F) of the views: the input, what of it was kept (NaN elsewhere), the reconstruction of
        its patches, each at its own mean and deviation."""
        mask = joined(batch.masks)
        patches, tokens = self.encode(batch, mask)
        if self.decoder is None:
            return pictures_of(batch, mask.masked)
        predictions = self.decoder(tokens, mask.kept, mask.valid if batch.short else None).float()
        targets = standardised(patches, real_values(batch.num_frames, batch.geometry))
        return pictures_of(batch, mask.masked, torch.where(mask.masked[..., None], predictions, targets))


def joined(masks: tuple[Mask, ...]) -> Mask:
    """The masks of all views, (V B, ...), view after view."""
    parts = ([getattr(mask, name) for mask in masks] for name in ("kept", "kept_valid", "masked", "valid"))
    return Mask(*(torch.cat(part) for part in parts))


def info_nce(projections: Tensor, options: ViewsOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Which of all views of the global batch is one of the same clip? (V, B, E) -> the loss, in nats, and metrics.

    Each view is asked for each of its V - 1 partners (Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020,
    equation 2); with two views it is SimCLR's NT-Xent. Chance is ln(V B - 1) over the global B.
    """
    views, clips, _ = projections.shape
    z = F.normalize(projections, dim=-1)
    every, rank = all_rows(z.transpose(0, 1))  # (all clips, V, E): ranks one after another
    scores = torch.einsum("vbe,cwe->vbwc", z, every) / options.temperature
    own = torch.arange(clips, device=z.device) + rank * clips
    same = own[:, None] == torch.arange(len(every), device=z.device)  # (B, all clips)
    itself = same[None, :, None] & torch.eye(views, dtype=torch.bool, device=z.device)[:, None, :, None]
    partner = same[None, :, None] & ~itself
    scores = scores.masked_fill(itself, -torch.inf).flatten(2)
    loss = -scores.log_softmax(2).masked_fill(~partner.flatten(2), 0.0).sum(2).mean() / (views - 1)
    right = partner.flatten(2).gather(2, scores.argmax(2, keepdim=True)).float().mean()
    count = torch.tensor(float(max(views * len(every) - 1, 1)), device=z.device)
    metrics = {"nce": loss, "nce_accuracy": right, "nce_chance": count.log(), **alignment_and_uniformity(z)}
    return loss, {name: value.detach() for name, value in metrics.items()}


def vicreg(projections: Tensor, options: ViewsOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """(V, B, E) -> VICReg's loss with its published weights: views of a clip agree (25), every channel varies over the
    global batch (25), and no two do so together (1)."""
    every = all_rows(projections.transpose(0, 1))[0].transpose(0, 1)  # (V, all clips, E)
    # every process adds up the same terms: their gradients' mean is that of the whole
    invariance = (every - every.mean(0)).square().mean() * 2 * len(every) / (len(every) - 1)
    centred = every - every.mean(1, keepdim=True)
    covariance = torch.einsum("vbe,vbf->vef", centred, centred) / max(every.shape[1] - 1, 1)
    std = (covariance.diagonal(dim1=1, dim2=2) + 1e-4).sqrt()
    variance = F.relu(1 - std).mean()
    width = every.shape[2]
    shared = (covariance.square().sum((1, 2)) - covariance.diagonal(dim1=1, dim2=2).square().sum(1)).mean() / width
    loss = 25 * invariance + 25 * variance + shared
    metrics = {"invariance": invariance, "variance": variance, "covariance": shared}
    metrics |= alignment_and_uniformity(F.normalize(projections, dim=-1))
    return loss, {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def alignment_and_uniformity(z: Tensor) -> dict[str, Tensor]:
    """How near views of a clip are, and how evenly views of different clips spread (Wang & Isola, ICML 2020): (V, B, E)
    of length 1 -> mean squared distance to the next view, and the log mean of exp(-2 distance^2), which is 0 where all
    is one point and about -4 where nothing is near anything."""
    distance = (2 - 2 * z[0] @ z[0].T).clamp(min=0)
    apart = distance[~torch.eye(len(distance), dtype=torch.bool, device=z.device)]
    uniformity = (-2 * apart).exp().mean().log() if len(apart) else z.new_tensor(torch.nan)
    return {"alignment": (z - z.roll(1, 0)).square().sum(-1).mean(), "uniformity": uniformity}
