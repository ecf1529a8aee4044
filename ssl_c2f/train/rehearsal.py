"""The dry run before a run: every phase and boundary for two steps, on noise."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from ssl_c2f.core import draws
from ssl_c2f.core.options import UserError
from ssl_c2f.curriculum.phases import Phase
from ssl_c2f.data.front_end import FrontEnd, Items, Statistics
from ssl_c2f.data.sampler import micro_batches
from ssl_c2f.train.loop import train_step
from ssl_c2f.train.state import Run, Training, carry_over, prepare


def dry_run(run: Run, phase: Phase, batch_size: int, steps: int) -> tuple[Run, Phase]:
    """The run as if it had this one phase, of so many steps, and batches of another size."""
    options = phase.options.model_copy(update={"batch_size": batch_size})
    short = replace(phase, options=options, first_step=0, first_sample=0, steps=steps)
    return replace(run, curriculum=replace(run.curriculum, phases=(short,))), short


def rehearse(run: Run, phases: Collection[Phase]) -> None:
    """A dry run: two steps of noise through every phase and boundary, in micro-batches of the real size. What does not
    fit or cannot work fails now, not after hours. No weight, generator or counter of the run is touched.

    Raises:
        UserError: a phase does not fit into memory.
    """
    device, world, limit = run.dist.device, run.dist.world, run.options.train.max_batch_per_device
    before: Training | None = None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for phase in sorted(phases, key=lambda p: p.index):
            # Two micro-batches are enough to meet accumulation, the largest and the smallest size among them.
            sizes = micro_batches(phase.batch_size // world, limit)[-2:]
            trial, short = dry_run(run, phase, sum(sizes) * world, steps=2)
            try:
                training = prepare(trial, short)
                if before:
                    carry_over(training, before.objective.state_dict(), before.ema, before.phase.geometry)
                front_end = FrontEnd(phase.geometry, Statistics(0.0, 1.0)).to(device)
                for _ in range(2):  # memory is fullest in the second: beside gradients and the optimiser's state
                    train_step(trial, training, iter([noise(run, phase, size) for size in sizes]), front_end)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                raise UserError(
                    f"phase {phase.name} does not fit into memory with {sizes[-1]} clips at a time: "
                    f"set train.max_batch_per_device below {sizes[-1]}"
                ) from None
            before = training


def noise(run: Run, phase: Phase, size: int) -> Items:
    """Full-length clips of noise with labels, for trials."""
    generator = torch.Generator().manual_seed(phase.index)
    samples, classes = phase.geometry.clip_samples, run.corpus.num_classes
    items = Items(
        audio=torch.randn(size, samples, generator=generator), num_samples=torch.full((size,), samples),
        index=torch.arange(size), keys=draws.key(phase.index, torch.arange(size)),
        labels=torch.eye(max(classes, 1))[torch.arange(size) % max(classes, 1)][:, :classes],
    )
    if not run.options.augment.mixup_prob:
        return items
    return Items(**{**vars(items), "partner": items, "share": torch.full((size,), 0.5)})
