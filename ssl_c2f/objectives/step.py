"""What every objective is and gives back, and what masked ones share.

Legend: B batch, T frames, F mel bins, N tokens, P values of a patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssl_c2f.core.options import Options
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.masks import Shape
from ssl_c2f.models.backbones import AnyModel
from ssl_c2f.models.heads import Readout, read_out
from ssl_c2f.models.patches import patchify, unpatchify
from ssl_c2f.models.vit import Encoder, EncoderOptions


@dataclass(frozen=True)
class StepResult:
    """The mean loss over the batch's clips (each weighs the same, however long it is) and named means beside it."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """An encoder and its heads, from a batch to a loss. `encoder` is what is carried over, probed and fine-tuned."""

    views: int  # masks per clip
    comparable_loss: bool  # whether validation may compare it
    geometry: Geometry
    encoder: Any  # of either backbone

    @abstractmethod
    def forward(self, batch: Batch) -> StepResult:
        """The loss, and what is logged beside it."""

    def after_step(self, u: float) -> None:
        """Called after each step of the optimiser, at the fraction `u` of the run."""

    @abstractmethod
    def embed(self, batch: Batch, kind: Readout = "mean") -> Tensor:
        """(B, D) features of whole clips ((B, 2 D) for mean_std), without gradients."""

    @abstractmethod
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Spectrograms (B, T, F) by name, the input first; NaN is what is not shown."""


class ObjectiveOptions(Options, ABC):
    """The options of an objective, found by their `name`."""

    mask_shape: ClassVar[Shape] = "uniform"  # unless mask.shape says otherwise
    name: str

    @abstractmethod
    def build(self, model: AnyModel, geometry: Geometry, num_classes: int) -> Objective:
        """The objective in a geometry, freshly initialised from torch's global generator."""

    @abstractmethod
    def costs(self, model: AnyModel, geometry: Geometry, mask_ratio: float, num_classes: int) -> list[cost.Part]:
        """Costs of one clip in one training step."""


def vit(model: AnyModel) -> EncoderOptions:
    """The encoder that can leave tokens out, as masked objectives need it; `RunOptions` lets them have no other."""
    assert isinstance(model, EncoderOptions)
    return model


def features_of(encoder: Encoder, batch: Batch, kind: Readout) -> Tensor:
    """(B, D) features of whole clips ((B, 2 D) for mean_std)."""
    tokens = encoder(patchify(batch.spec, batch.geometry), valid=batch.valid)
    return read_out(tokens, batch.valid, kind, encoder.num_prefix)


def pictures_of(batch: Batch, masked: Tensor, reconstruction: Tensor | None = None) -> dict[str, Tensor]:
    """Spectrograms (B, T, F): the input, what of it is not `masked` (B, N) with NaN elsewhere, and, given as patches
    (B, N, P), the reconstruction."""
    patches = patchify(batch.spec, batch.geometry)
    views = {"input": patches, "kept": patches.masked_fill(masked[..., None], torch.nan)}
    if reconstruction is not None:
        views["reconstruction"] = reconstruction
    return {name: unpatchify(view, batch.geometry) for name, view in views.items()}
