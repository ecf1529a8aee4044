"""A run is a list of phases, and what changes over time is a pure function of the step.

Nothing here keeps state: to resume at a step is to ask for that step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from ssl_c2f.core.options import Options

Shape = Literal["uniform", "cluster", "time", "frequency", "inverse_block", "one_way_cluster"]

LENGTHS = ("epochs", "steps", "samples", "flops")


class PhaseOptions(Options):
    """One entry of `phases:`. What is left out is the run's own (`optim.lr`, `mask.ratio`, `model.patch_t`, ...)."""

    alternatives = (LENGTHS, ("warmup_epochs", "warmup_steps"))

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$", description="names the phase's folder")
    epochs: float | None = Field(None, gt=0, description="length; give exactly one of epochs, steps, samples, flops")
    steps: int | None = Field(None, gt=0)
    samples: int | None = Field(None, gt=0)
    flops: float | None = Field(None, gt=0)
    time_factor: int = Field(1, ge=1, description="how many times coarser in time than the fine phase")
    batch_size: int = Field(64, ge=1, description="global: over all devices and accumulation steps")
    lr: float | None = Field(None, gt=0)
    min_lr_ratio: float | None = Field(None, ge=0, le=1, description="where the phase's cosine ends, as a share of lr")
    warmup_epochs: float | None = Field(None, ge=0, description="linear warm-up; give warmup_epochs or warmup_steps")
    warmup_steps: int | None = Field(None, ge=0)
    mask_ratio: float | None = Field(None, gt=0, lt=1)
    mask_shape: Shape | None = None
    patch_f: int | None = Field(None, ge=1)
    patch_t: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> PhaseOptions:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(LENGTHS)}, not {' and '.join(given) or 'none'}")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("give warmup_epochs or warmup_steps, not both")
        return self


@dataclass(frozen=True)
class Phase:
    """A phase whose length is known in steps."""

    index: int
    name: str
    first_step: int
    steps: int
    first_sample: int
    batch_size: int
    time_factor: int
    lr: float
    min_lr_ratio: float
    warmup_steps: int
    mask_ratio: float
    mask_shape: Shape

    @property
    def last_step(self) -> int:
        """Steps done when the phase ends."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class Place:
    """Where a step stands: phase `index`, and the fractions done of the phase (t) and of the run (u), in [0, 1]."""

    index: int
    phase: Phase
    t: float
    u: float


@dataclass(frozen=True)
class Curriculum:
    """The phases of a run in order."""

    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        return self.phases[-1].last_step

    def lookup(self, step: int) -> Place:
        """The place of the step with `step` steps done before it; the run's end belongs to the last phase.

        Raises:
            ValueError: the step is not in the run.
        """
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} is outside of the run's {self.steps} steps")
        phase = next((p for p in self.phases if step < p.last_step), self.phases[-1])
        return Place(phase.index, phase, (step - phase.first_step) / phase.steps, step / self.steps)

    def samples(self, step: int) -> int:
        """Clips seen when `step` steps are done."""
        phase = self.lookup(step).phase
        return phase.first_sample + (step - phase.first_step) * phase.batch_size


def make_curriculum(
    options: Sequence[PhaseOptions], *, num_clips: int, lr: float, min_lr_ratio: float, mask_ratio: float,
    mask_shape: Shape, flops_per_clip: Sequence[float],
) -> Curriculum:
    """Turn lengths in epochs, steps, samples or FLOPs into steps: the nearest number of them, at least one.

    Args:
        num_clips: clips of an epoch.
        lr, min_lr_ratio, mask_ratio, mask_shape: what phases take that set none.
        flops_per_clip: training cost of one clip in each phase.
    """
    phases: list[Phase] = []
    first_step = first_sample = 0
    for index, (option, cost) in enumerate(zip(options, flops_per_clip, strict=True)):
        clips = {
            "epochs": (option.epochs or 0) * num_clips,
            "steps": (option.steps or 0) * option.batch_size,
            "samples": option.samples or 0,
            "flops": (option.flops or 0) / cost,
        }
        steps = max(1, round(max(clips.values()) / option.batch_size))
        warmup = option.warmup_steps or round((option.warmup_epochs or 0) * num_clips / option.batch_size)
        phases.append(
            Phase(
                index=index, name=option.name, first_step=first_step, steps=steps, first_sample=first_sample,
                batch_size=option.batch_size, time_factor=option.time_factor, lr=option.lr or lr,
                min_lr_ratio=min_lr_ratio if option.min_lr_ratio is None else option.min_lr_ratio,
                warmup_steps=min(warmup, steps), mask_ratio=option.mask_ratio or mask_ratio,
                mask_shape=option.mask_shape or mask_shape,
            )
        )
        first_step += steps
        first_sample += steps * option.batch_size
    return Curriculum(tuple(phases))


def learning_rate(place: Place, schedule: Literal["cosine", "constant"] = "cosine") -> float:
    """Linear warm-up from the first step on, then a half cosine down to `min_lr_ratio` of the peak; each phase anew."""
    phase, done = place.phase, round(place.t * place.phase.steps)
    if done < phase.warmup_steps:
        return phase.lr * (done + 1) / phase.warmup_steps
    if schedule == "constant":
        return phase.lr
    t = (done - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * t)))
