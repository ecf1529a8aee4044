"""Classification: training from scratch, fine-tuning, and linear probes of a frozen encoder.

Legend: B batch, N tokens, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.data.front_end import Batch
from ssl_c2f.models.encoder import EncoderOptions
from ssl_c2f.models.heads import Head, HeadKind
from ssl_c2f.models.patches import patchify
from ssl_c2f.objectives.base import Objective, ObjectiveOptions, StepResult


class SupervisedOptions(ObjectiveOptions):
    """Cross-entropy for single-label data, a sigmoid and binary cross-entropy for each class of multi-label data."""

    name: Literal["supervised"] = "supervised"
    head: HeadKind = Field("mean_pool", description="ast: mean of the class tokens; linear: a probe, encoder frozen")
    labels: Literal["single", "multi"] = "single"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="of the loss; balanced: every class weighs the same, however many clips it has"
    )

    @property
    def num_masks(self) -> int:
        return 0

    def build(self, model: EncoderOptions, geometry: Geometry, num_classes: int) -> Objective:
        return Supervised(model, self, geometry, num_classes)

    def costs(self, model: EncoderOptions, geometry: Geometry, mask_ratio: float, num_classes: int) -> list[cost.Part]:
        frozen = self.head == "linear"  # such an encoder runs forward only
        width = model.width * (geometry.grid_f // geometry.merge if self.head == "bands" else 1)
        head = cost.Part("head", cost.linear(1, width, num_classes), 2.0 if frozen else 3.0)
        return [*model.costs(geometry, passes=1.0 if frozen else 3.0), head]


class Supervised(Objective):
    """Encoder of all tokens and a linear head."""

    class_weights: Tensor

    def __init__(self, model: EncoderOptions, options: SupervisedOptions, geometry: Geometry, num_classes: int) -> None:
        super().__init__(model, geometry)
        self.options = options
        e = self.encoder
        self.head = Head(options.head, e.width, num_classes, e.num_prefix, e.layout)
        self.frozen = options.head == "linear"
        self.register_buffer("class_weights", torch.ones(num_classes), persistent=False)
        self.encoder.requires_grad_(not self.frozen)

    def count(self, labels: Tensor) -> None:
        """Learn from the (n, C) labels of the training clips what each class weighs in the loss: 1 on average over the
        clips, and in proportion to one over its number of clips."""
        if self.options.class_weights == "balanced":
            counts = labels.sum(0)
            weights = torch.where(counts > 0, counts.sum() / counts.clamp(min=1) / (counts > 0).sum().clamp(min=1), 1.0)
            self.class_weights.copy_(weights)

    def train(self, mode: bool = True) -> Supervised:
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def logits(self, batch: Batch) -> Tensor:
        """(B, C)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.encoder(patchify(batch.spec, batch.geometry), valid=batch.valid)
        logits: Tensor = self.head(tokens, self.encoder.real(batch.valid))
        return logits.float()

    @torch.no_grad()
    def head_features(self, batch: Batch) -> Tensor:
        """What the head's linear layer gets, without gradients."""
        tokens = self.encoder(patchify(batch.spec, batch.geometry), valid=batch.valid)
        return self.head.features(tokens, self.encoder.real(batch.valid)).float()

    def forward(self, batch: Batch) -> StepResult:
        logits, labels = self.logits(batch), batch.labels
        smoothing = self.options.label_smoothing
        if self.options.labels == "single":
            loss = F.cross_entropy(logits, labels, self._weights(), label_smoothing=smoothing)
            right = (logits.argmax(1) == labels.argmax(1)).float().mean()
            return StepResult(loss, {"accuracy": right.detach()})
        targets = labels * (1 - smoothing) + 0.5 * smoothing
        return StepResult(F.binary_cross_entropy_with_logits(logits, targets, self._weights()))

    def _weights(self) -> Tensor | None:
        return self.class_weights if self.options.class_weights == "balanced" else None

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """(B, C) probabilities: a softmax over the classes with single labels, a sigmoid for each with several."""
        logits = self.logits(batch)
        return logits.softmax(1) if self.options.labels == "single" else logits.sigmoid()
