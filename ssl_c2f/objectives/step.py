"""What every objective gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """The mean loss over the batch's clips (each weighs the same, however long it is) and named means beside it."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
