"""The curriculum: a run is a list of phases, and what changes over time is a pure function of the step.

Nothing here has state, so a run resumes at a step by looking that step up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from ssl_c2f.core.options import Options
from ssl_c2f.curriculum.cost import Part, seen_tokens, step_flops
from ssl_c2f.curriculum.geometry import Geometry

Shape = Literal["uniform", "cluster", "time", "frequency", "inverse_block", "one_way_cluster"]

LENGTHS = ("epochs", "steps", "samples", "flops")


class PhaseOptions(Options):
    """One entry of `phases:`. What it leaves out is the run's (`optim.lr`, `mask.ratio`, `model.patch_t`, ...)."""

    alternatives = (LENGTHS, ("warmup_epochs", "warmup_steps"))

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$", description="names the phase's folder")
    epochs: float | None = Field(None, gt=0, description="length; give exactly one of epochs, steps, samples, flops")
    steps: int | None = Field(None, gt=0)
    samples: int | None = Field(None, gt=0)
    flops: float | None = Field(None, gt=0)
    time_factor: int = Field(1, ge=1, le=1024, description="how many times coarser in time than the fine phase")
    batch_size: int = Field(64, ge=1, description="global: over all devices and accumulation steps")
    lr: float | None = Field(None, gt=0)
    min_lr_ratio: float | None = Field(None, ge=0, le=1, description="where the cosine ends, as a fraction of lr")
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

    def patch(self, models: tuple[int, int]) -> tuple[int, int] | None:
        """The phase's own patch, whose one side may be the model's; None where it sets neither side."""
        return (self.patch_f or models[0], self.patch_t or models[1]) if self.patch_f or self.patch_t else None


@dataclass(frozen=True)
class Masking:
    """How the masks of a phase are drawn (by `data.masks`)."""

    shape: Shape
    ratio: float
    size: tuple[int, int]  # least and greatest side of a block, in tokens
    num_masks: int = 1  # for each clip
    seconds: tuple[float, float] | None = None  # least and greatest length of a block in time; None: `size`
    shapes: tuple[Shape, ...] = ()  # of the masks in turn; none: `shape` for all
    view_seconds: float | None = None  # each mask is of a stretch of the clip of its own; None: all are of the clip


@dataclass(frozen=True)
class Phase:
    """A phase as it runs: its options, what they leave to the run filled in, and its geometry, masks and cost."""

    index: int
    options: PhaseOptions
    geometry: Geometry
    masking: Masking | None  # None: the objective sees whole clips
    costs: tuple[Part, ...]  # of one clip in one step
    lr: float
    min_lr_ratio: float
    first_step: int
    steps: int
    warmup_steps: int
    first_sample: int

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def batch_size(self) -> int:
        """Global: over all devices and accumulation steps."""
        return self.options.batch_size

    @property
    def last_step(self) -> int:
        """Steps done when the phase ends."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class Curriculum:
    """The phases of a run in order."""

    phases: tuple[Phase, ...]
    clips_per_epoch: int

    @property
    def steps(self) -> int:
        return self.phases[-1].last_step

    def lookup(self, step: int) -> tuple[Phase, float, float]:
        """The phase that contains step number `step` (from 0 on), and the fractions done before it of the phase (t) and
        of the run (u), in [0, 1]. The end of the run belongs to the last phase.

        Raises:
            ValueError: the step is not in the run.
        """
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} is outside of the run's {self.steps} steps")
        phase = next((p for p in self.phases if step < p.last_step), self.phases[-1])
        return phase, (step - phase.first_step) / phase.steps, step / self.steps

    def spent(self, step: int) -> float:
        """The share of the run's FLOPs that is behind a step, in [0, 1]."""
        return self.counters(step)["flops"] / self.counters(self.steps)["flops"]

    def samples(self, step: int) -> int:
        """Clips seen when `step` steps are done."""
        phase, _, _ = self.lookup(step)
        return phase.first_sample + (step - phase.first_step) * phase.batch_size

    def counters(self, step: int) -> dict[str, float]:
        """Clips, tokens and FLOPs used when `step` steps are done."""
        tokens, flops = 0, 0.0
        for phase in self.phases:
            clips = min(max(step - phase.first_step, 0), phase.steps) * phase.batch_size
            tokens, flops = tokens + clips * seen_tokens(phase.costs), flops + clips * step_flops(phase.costs)
        return {"samples": self.samples(step), "tokens": tokens, "flops": flops}


def make_phase(
    options: PhaseOptions, before: Phase | None, *, geometry: Geometry, masking: Masking | None,
    costs: tuple[Part, ...], num_clips: int, lr: float, min_lr_ratio: float,
) -> Phase:
    """The phase that comes after `before`. Its length in epochs, samples or FLOPs becomes the nearest number of steps,
    at least one.

    Args:
        num_clips: clips of an epoch.
        lr, min_lr_ratio: of the run, for a phase that sets none.
    """
    clips = {
        "epochs": (options.epochs or 0) * num_clips,
        "steps": (options.steps or 0) * options.batch_size,
        "samples": options.samples or 0,
        "flops": (options.flops or 0) / step_flops(costs),
    }
    steps = max(1, round(max(clips.values()) / options.batch_size))
    warmup = options.warmup_steps or round((options.warmup_epochs or 0) * num_clips / options.batch_size)
    return Phase(
        index=before.index + 1 if before else 0, options=options, geometry=geometry, masking=masking, costs=costs,
        lr=options.lr or lr, min_lr_ratio=min_lr_ratio if options.min_lr_ratio is None else options.min_lr_ratio,
        first_step=before.last_step if before else 0, steps=steps, warmup_steps=min(warmup, steps),
        first_sample=before.first_sample + before.steps * before.batch_size if before else 0,
    )


Schedule = Literal["cosine", "constant", "trunk", "run_cosine"]
COOLDOWN = 0.2  # share of a trunk's FLOPs: a fifth is as good as a whole cosine (Haegele et al., arXiv 2405.18392)


def learning_rate(phase: Phase, t: float, schedule: Schedule = "cosine", spent: float = 0.0) -> float:
    """Linear warm-up from the first step on, then the schedule, down to `min_lr_ratio` of the peak.

    `cosine` and `constant` begin anew in each phase. `trunk` and `run_cosine` are one schedule over the FLOPs of the
    run, `spent` being the share that is behind the step, and take no notice of phases, of which only the first warms
    up: a trunk stays at the peak and falls with 1 - sqrt over the last fifth; the other is half a cosine.
    """
    done = round(t * phase.steps)
    if done < phase.warmup_steps:
        return phase.lr * (done + 1) / phase.warmup_steps
    if schedule == "constant":
        return phase.lr
    if schedule in ("trunk", "run_cosine"):
        fallen = math.sqrt(max(spent - (1 - COOLDOWN), 0) / COOLDOWN)
        left = 1 - fallen if schedule == "trunk" else 0.5 * (1 + math.cos(math.pi * spent))
        return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * left)
    t = (done - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    return phase.lr * (phase.min_lr_ratio + (1 - phase.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * t)))
