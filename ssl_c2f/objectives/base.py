"""The interface of objectives. A new one has to give its options and its loss; all else has a default here.

Legend: B batch, T frames, F mel bins, N tokens, P values of a patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_c2f.core.options import Options
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Shape
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.masks import Mask, num_masked
from ssl_c2f.models.encoder import EncoderOptions
from ssl_c2f.models.heads import Layer, Readout, read_out
from ssl_c2f.models.patches import patchify, unpatchify
from ssl_c2f.models.vit import ViTOptions


@dataclass(frozen=True)
class StepResult:
    """The loss: a mean over the clips of the batch, each with the same weight however long it is. And further means."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """An encoder and its heads, from a batch to a loss. It knows nothing of devices, DDP, optimisers or checkpoints."""

    comparable_loss = True  # whether losses may be compared between phases: only then are they validated
    encoder: Any  # an Encoder; it is carried over to the next phase, probed and fine-tuned

    def __init__(self, model: EncoderOptions, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.encoder = model.build(geometry)

    @abstractmethod
    def forward(self, batch: Batch) -> StepResult:
        """The loss and the metrics to log."""

    def after_step(self, u: float) -> None:
        """Called after each step of the optimiser, at the fraction `u` of the run."""

    @torch.no_grad()
    def embed(self, batch: Batch, kind: Readout = "mean", layer: Layer = "last") -> Tensor:
        """(B, D) features of whole clips, wider for readouts other than the mean (see `read_out`)."""
        return self.embeddings(batch, [(layer, kind)])[layer, kind]

    @torch.no_grad()
    def embeddings(self, batch: Batch, wanted: Sequence[tuple[Layer, Readout]]) -> dict[tuple[Layer, Readout], Tensor]:
        """The same of several layers and readouts, each layer computed once."""
        e, patches = self.encoder, patchify(batch.spec, batch.geometry)
        tokens = {layer: e.read(patches, batch.valid, layer) for layer in dict(wanted)}
        real = e.real(batch.valid)
        return {(layer, kind): read_out(tokens[layer], real, kind, e.num_prefix, e.layout) for layer, kind in wanted}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Spectrograms (B, T, F) by name: the input first, then what the first mask keeps of it (NaN elsewhere)."""
        return pictures_of(batch, batch.masks[0].masked if batch.masks else None)


class ObjectiveOptions(Options, ABC):
    """The options of an objective, chosen by `objective.name`."""

    mask_shape: ClassVar[Shape] = "uniform"  # unless mask.shape says otherwise
    whole_batch: ClassVar[bool] = False  # clips of a batch are compared: it cannot be accumulated in parts
    name: str

    def seen(self, geometry: Geometry) -> Geometry:
        """The geometry of what the encoder is shown in training: the clip's, unless views are cut out of it."""
        return geometry

    @property
    def num_masks(self) -> int:
        """Masks to draw for each clip; 0: the objective sees whole clips."""
        return 1

    @abstractmethod
    def build(self, model: EncoderOptions, geometry: Geometry, num_classes: int) -> Objective:
        """The objective in a geometry, freshly initialised from torch's global generator."""

    def costs(self, model: EncoderOptions, geometry: Geometry, mask_ratio: float, num_classes: int) -> list[cost.Part]:
        """Costs of one clip in one training step. By default they are counted (see `count_cost`)."""
        return [count_cost(self, model, geometry, mask_ratio, num_classes)]


def vit(model: EncoderOptions) -> ViTOptions:
    """The ViT, which can leave tokens out as masked objectives need it. `Recipe` refuses others."""
    assert isinstance(model, ViTOptions)
    return model


def pictures_of(batch: Batch, masked: Tensor | None, reconstruction: Tensor | None = None) -> dict[str, Tensor]:
    """Spectrograms (B, T, F): the input, its tokens that are not `masked` (B, N) with NaN elsewhere, and the
    reconstruction, which is given as patches (B, N, P)."""
    pictures = {"input": batch.spec[:, : batch.geometry.covered]}
    if masked is not None:
        kept = patchify(batch.spec, batch.geometry).masked_fill(masked[..., None], torch.nan)
        pictures["kept"] = unpatchify(kept, batch.geometry)
    if reconstruction is not None:
        pictures["reconstruction"] = unpatchify(reconstruction, batch.geometry)
    return pictures


@lru_cache
def count_cost(
    options: ObjectiveOptions, model: EncoderOptions, geometry: Geometry, mask_ratio: float, num_classes: int
) -> cost.Part:
    """FLOPs of one clip in one training step as PyTorch counts them, and the tokens that are encoded with gradients.

    Nothing is computed: fake tensors have sizes but no values, so a loss that needs a value (`.item()`) has to override
    `costs` with a formula. The batch has two clips, so that losses that compare clips are counted too.
    """
    with torch.random.fork_rng([]):
        objective = options.build(model, geometry, num_classes).train()
    clips, seen = 2, 0

    def look(encoder: Any, inputs: Any, tokens: Tensor) -> None:
        nonlocal seen
        if torch.is_grad_enabled():
            seen += len(tokens) * (tokens.shape[1] - encoder.num_prefix)

    objective.encoder.register_forward_hook(look)
    mapping = {torch.ops.aten.convolution_backward: _grouped_convolution_backward}
    with (
        FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH),  # CPUs' fused attention counts as 0
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
    ):
        loss = objective(_empty_batch(geometry, options.num_masks, mask_ratio, num_classes, clips)).loss
        forward = counter.get_total_flops()
        loss.backward()
    return cost.Part("step", forward / clips, counter.get_total_flops() / forward, seen // clips)


def _empty_batch(geometry: Geometry, num_masks: int, mask_ratio: float, num_classes: int, clips: int) -> Batch:
    """Full-length clips with masks; values are undefined."""
    tokens = geometry.num_tokens
    kept = torch.empty(clips, tokens - num_masked(tokens, mask_ratio), dtype=torch.int64)
    masked = torch.empty(clips, tokens, dtype=torch.bool)
    spec, numbers = torch.empty(clips, geometry.num_frames, geometry.num_mels), torch.empty_like(kept[:, 0])
    masks = (Mask(kept, kept.bool(), masked, masked),) * num_masks
    return Batch(spec, numbers, numbers, numbers, torch.empty(clips, num_classes), geometry, short=False, masks=masks)


def _grouped_convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """One product for the input and one for the weights; PyTorch's counter takes the latter for that of a dense one."""
    return int(sum(rest[-1][:2]) * 2 * grad.numel() * weight[1:].numel())
