"""FLOPs as PyTorch's counter counts them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_c2f.core import draws
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.front_end import FrontEnd, Items, Statistics

CLASSES, CLIPS = 10, 1


def counted(objective: torch.nn.Module, geometry: Geometry, masking: Masking | None) -> float:
    """FLOPs per clip of one training step, by PyTorch's counter (fused attention off: it counts as 0 on CPUs)."""
    items = Items(
        audio=torch.randn(CLIPS, geometry.clip_samples), num_samples=torch.full((CLIPS,), geometry.clip_samples),
        index=torch.arange(CLIPS), keys=draws.key(0, torch.arange(CLIPS)), labels=torch.eye(CLASSES)[:CLIPS],
    )
    batch = FrontEnd(geometry, Statistics(0.0, 1.0))(items, masking)
    corrected = {torch.ops.aten.convolution_backward: backward_of_a_grouped_convolution}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        objective(batch).loss.backward()
    return float(counter.get_total_flops()) / CLIPS


def backward_of_a_grouped_convolution(
    grad: torch.Size, x: torch.Size, weight: torch.Size, *rest: Any, out_shape: Any = None, **more: Any
) -> int:
    """FLOPs of the gradients of input and weights; PyTorch counts the latter as for a convolution without groups."""
    return sum(rest[-1][:2]) * 2 * grad.numel() * weight[1:].numel()
