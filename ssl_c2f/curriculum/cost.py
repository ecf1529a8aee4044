"""FLOPs and memory of a phase, before it runs. One multiply-add is 2 FLOPs.

Only matrix products are counted (linear layers, attention), as PyTorch's own counter does; norms, activations and the
optimiser are below 1 % of a step. The backward pass of a product costs one product for its weights and one for its
input, so training is 3 x forward, and 2 x where no gradient flows into the input (the patch embedding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Part:
    """One part of a training step: the FLOPs of its forward pass for one clip, and how many of these a step costs."""

    name: str
    forward: float
    passes: float = 3.0
    tokens: int = 0  # of the clip that are encoded with gradients

    @property
    def step(self) -> float:
        return self.forward * self.passes


def linear(tokens: float, inputs: int, outputs: int) -> float:
    """FLOPs of a linear layer."""
    return 2.0 * tokens * inputs * outputs


def transformer(tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
    """FLOPs of `depth` pre-norm blocks over `tokens` tokens: projections, both attention products and the MLP."""
    projections = linear(tokens, width, 4 * width)
    attention = 2 * linear(tokens, width, tokens)
    mlp = 2 * linear(tokens, width, int(width * mlp_ratio))
    return depth * (projections + attention + mlp)


def times(count: int, parts: Sequence[Part]) -> list[Part]:
    """The same parts, run `count` times in a step."""
    return [replace(part, forward=count * part.forward, tokens=count * part.tokens) for part in parts]


def seen_tokens(parts: Sequence[Part]) -> int:
    """Tokens of one clip that the encoder is trained on in one step, over all masks; not those of a teacher."""
    return sum(part.tokens for part in parts)


def forward_flops(parts: Sequence[Part]) -> float:
    return sum(part.forward for part in parts)


def step_flops(parts: Sequence[Part]) -> float:
    """FLOPs of one training step for one clip."""
    return sum(part.step for part in parts)


def transformer_bytes(tokens: int, width: int, depth: int, mlp_ratio: float, bytes_per_value: int = 4) -> float:
    """Activations that `depth` blocks keep of one clip for the backward pass, with fused attention.

    Per token and block: the inputs of two norms and their outputs, qkv, the attention's output twice (and as the
    projection's input), and the MLP's hidden layer before and after its activation: about (9 + 2 mlp_ratio) widths.
    All have `bytes_per_value`, except the inputs of the norms, which autocast leaves in fp32.
    """
    return depth * tokens * width * (2 * 4 + (7 + 2 * mlp_ratio) * bytes_per_value)


def state_bytes(parameters: int, ema: bool, frozen: int = 0) -> float:
    """Bytes of weights, gradients and AdamW's two averages in fp32, and of the EMA if there is one. `frozen` of the
    parameters (a teacher's, a linear probe's encoder) have no gradients and no optimiser state."""
    return 4.0 * (parameters * (5 if ema else 4) - 3 * frozen)
