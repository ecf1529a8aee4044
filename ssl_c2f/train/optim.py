"""Parameter groups and the optimiser."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ssl_c2f.core.options import Options
from ssl_c2f.curriculum.phases import Schedule

Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimOptions(Options):
    """AdamW, and the learning rate's schedule."""

    lr: float | None = Field(None, gt=0, description="peak, of phases that set none; 5e-4 if not given")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where the cosine ends, as a fraction of the peak")
    schedule: Schedule = Field(
        "cosine", description="cosine, constant: anew in every phase; trunk (constant, 1 - sqrt over the last fifth of "
        "the FLOPs) and run_cosine: once over the run"
    )
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    head_lr: float = Field(1.0, gt=0, description="factor on the lr of all that is not the encoder")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the lr from a layer to the one below")
    moments: Literal["keep", "reset"] = Field("keep", description="optimiser state, at a phase boundary")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter, as in BEiT's layer-wise decay: 0 embeddings, 1 ... depth the blocks (a layer
    that merges tokens counts with the block after it), depth + 1 the rest."""
    if match := re.match(r"encoder\.(?:blocks|merges)\.(\d+)\.", name):
        return int(match[1]) + 1
    return depth + 1 if not name.startswith("encoder.") or name.startswith("encoder.norm") else 0


def make_optimizer(objective: nn.Module, options: OptimOptions, depth: int) -> torch.optim.AdamW:
    """Fused AdamW. No weight decay on vectors (biases, norms), tokens, positions and relative position biases.

    Each group has an `lr_scale`."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or name.endswith(("_token", "positions", "bias_table"))
        decay = 0.0 if plain else options.weight_decay
        scale = options.layer_decay ** (depth + 1 - layer_of(name, depth))
        scale *= 1.0 if name.startswith("encoder.") else options.head_lr
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=options.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state by parameter name."""
    return {
        name: optimizer.state[parameter]
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def restore_state(optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Any]]) -> int:
    """Set the saved state of parameters of the same name and shape; returns for how many."""
    taken = 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = saved.get(name)
            if state and state["exp_avg"].shape == parameter.shape:
                device = parameter.device
                optimizer.state[parameter] = {
                    # fused AdamW needs its step counter on the parameter's device
                    key: value.detach().clone().to(device) for key, value in state.items()
                }
                taken += 1
    return taken
