"""The plan of a run: tokens, FLOPs and memory of each phase, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.phases import Phase
from ssl_c2f.train.recipe import RunOptions


@dataclass(frozen=True)
class PhasePlan:
    """The cost of a phase."""

    name: str
    time_factor: int
    hop_ms: float
    frames: int
    grid: tuple[int, int]
    tokens: int
    kept: int  # tokens of a clip that are encoded with gradients, over all masks
    batch_size: int
    steps: int
    clips: int
    gflops_per_clip: float  # one training step
    tflops_per_step: float
    pflops: float  # the phase
    parts: dict[str, float]  # GFLOPs per clip by part
    activation_mb_per_clip: float


@dataclass(frozen=True)
class Plan:
    """The cost of a run, and of a run of as many clips at full resolution."""

    phases: tuple[PhasePlan, ...]
    parameters: int
    state_mb: float
    pflops: float
    single_phase_pflops: float
    rehearsal_pflops: float

    @property
    def share(self) -> float:
        """Cost as a fraction of that of the single-phase run."""
        return self.pflops / self.single_phase_pflops

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share_of_single_phase": self.share}


def make_plan(options: RunOptions, num_clips: int, num_classes: int) -> Plan:
    """The cost of a run over a set of `num_clips`, from its options alone."""
    phases = options.curriculum(num_clips, num_classes).phases
    with torch.random.fork_rng():
        objective = options.build(phases[-1].geometry, num_classes)
    parameters = sum(p.numel() for p in objective.parameters())
    frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    plans = [_phase_plan(options, phase) for phase in phases]
    limit = options.train.max_batch_per_device or max(p.batch_size for p in phases)
    fine = options.costs(options.phases[-1], options.fine_geometry, num_classes)
    return Plan(
        phases=tuple(plans), parameters=parameters,
        state_mb=cost.state_bytes(parameters, options.ema > 0, frozen) / 1e6,
        pflops=sum(p.pflops for p in plans),
        single_phase_pflops=sum(p.clips for p in plans) * cost.step_flops(fine) / 1e15,
        rehearsal_pflops=sum(2 * min(2 * limit, p.batch_size) * p.gflops_per_clip for p in plans) / 1e6,
    )


def _phase_plan(options: RunOptions, phase: Phase) -> PhasePlan:
    geometry, per_clip, tokens = phase.geometry, cost.step_flops(phase.costs), cost.seen_tokens(phase.costs)
    clips, bytes_per_value = phase.steps * phase.batch_size, 2 if options.train.precision == "bf16" else 4
    return PhasePlan(
        name=phase.name, time_factor=geometry.time_factor, hop_ms=geometry.hop_ms * geometry.pool,
        frames=geometry.frames(geometry.clip_samples), grid=geometry.grid, tokens=geometry.num_tokens,
        kept=tokens, batch_size=phase.batch_size, steps=phase.steps, clips=clips,
        gflops_per_clip=per_clip / 1e9, tflops_per_step=per_clip * phase.batch_size / 1e12,
        pflops=per_clip * clips / 1e15,
        parts={part.name: part.step / 1e9 for part in phase.costs},
        activation_mb_per_clip=options.model.activation_bytes(geometry, tokens, bytes_per_value) / 1e6,
    )


def plan_rows(plan: Plan) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Columns and rows of the plan's table."""
    columns = ("phase", "C", "hop", "frames", "grid", "tokens", "kept", "batch", "steps", "GFLOPs/clip", "TFLOPs/step",
               "PFLOPs", "share")
    rows = [
        (p.name, p.time_factor, f"{p.hop_ms:g} ms", p.frames, f"{p.grid[0]}x{p.grid[1]}", p.tokens, p.kept,
         p.batch_size, p.steps, f"{p.gflops_per_clip:.3g}", f"{p.tflops_per_step:.3g}", f"{p.pflops:.3g}",
         f"{p.pflops / plan.pflops:.0%}")
        for p in plan.phases
    ]
    return columns, [*rows, ("total", *[""] * 10, f"{plan.pflops:.3g}", f"{plan.share:.0%} of single-phase")]
