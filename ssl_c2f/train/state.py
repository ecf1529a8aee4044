"""What a phase trains, and how it stands on disk.

A phase starts from its own newest checkpoint, else from the last one of the phase before, else from the weights that
the run was given, else from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_c2f.core import checkpoint, distributed, draws
from ssl_c2f.core.files import write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import PhaseFolder, RunFolder
from ssl_c2f.core.signals import Stop
from ssl_c2f.curriculum import cost
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Curriculum, Phase
from ssl_c2f.curriculum.transfer import TransferReport, transfer
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.runner import Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives import Objective
from ssl_c2f.train import optim
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.weights import Weights


@dataclass(frozen=True)
class Run:
    """What all phases share."""

    options: RunOptions
    folder: RunFolder
    statistics: InputStatistics
    curriculum: Curriculum
    dist: distributed.Dist
    initial: Weights | None
    stop: Stop
    kind: str
    group: str = ""  # of its W&B runs

    @property
    def corpus(self) -> Corpus:
        return self.statistics.corpus

    def phase_folder(self, phase: Phase) -> PhaseFolder:
        return self.folder.phase(phase.index, phase.name)

    def newest(self, phase: Phase) -> Path | None:
        """A phase's newest checkpoint as the main process sees it: others may look at an older listing of a network's
        file system. Every process must ask."""
        found: Path | None = self.dist.broadcast_object(self.phase_folder(phase).newest())
        return found

    def costs(self, index: int) -> tuple[int, float]:
        """Tokens that the encoder sees, and FLOPs of a training step, for one clip of a phase."""
        parts = self.options.parts(index, self.corpus.num_classes)
        return cost.seen_tokens(parts), cost.step_flops(parts)

    def runner(self, geometry: Geometry, stop: Stop | None = None) -> Runner:
        """Reads windows in a geometry, on this process's device."""
        front_end = self.statistics.front_end(geometry).to(self.dist.device)
        return Runner(self.corpus, front_end, self.options.evaluation.batch_size, stop)

    def counters(self, step: int) -> dict[str, float]:
        """Samples, tokens and FLOPs that are behind a step: functions of the step alone."""
        samples, tokens, flops = self.curriculum.samples(step), 0, 0.0
        for phase in self.curriculum.phases:
            clips = min(max(step - phase.first_step, 0), phase.steps) * phase.batch_size
            per_clip = self.costs(phase.index)
            tokens, flops = tokens + clips * per_clip[0], flops + clips * per_clip[1]
        return {"samples": samples, "tokens": tokens, "flops": flops}


@dataclass
class Training:
    """What a phase changes."""

    objective: Objective
    model: nn.Module  # the objective, wrapped for DDP and compilation
    optimizer: torch.optim.AdamW
    ema: dict[str, Tensor] | None
    step: int
    geometry: Geometry
    train_seconds: float = 0.0
    skipped: int = 0


def prepare(run: Run, objective: Objective, step: int) -> Training:
    """Put a new objective on the device, with its optimiser and wrappers."""
    o, device = run.options, run.dist.device
    objective = objective.to(device).train()
    model: nn.Module = torch.compile(objective) if o.train.compile else objective  # type: ignore[assignment]
    if run.dist.world > 1:
        ids = [run.dist.local_rank] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids)
        # Buffers are tables, equal everywhere. The argument of this name is deprecated since torch 2.13, and the one
        # that replaces it is unknown to 2.11; the attribute is read at each forward pass by all of them.
        model.broadcast_buffers = False
    ema = {name: value.clone() for name, value in objective.state_dict().items()} if o.ema else None
    optimizer = optim.make_optimizer(objective, o.optim, o.model.depth)
    return Training(objective, model, optimizer, ema, step, objective.geometry)


def build(run: Run, phase: Phase) -> Objective:
    """A phase's objective with fresh weights, the same in every process. The global generators are left alone."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(draws.seed(run.options.seed, phase.index, "weights"))
        return run.options.build(run.options.geometries[phase.index], run.corpus.num_classes)


def start(run: Run, phase: Phase, note: Callable[[str], object]) -> Training:
    """The phase where it stands on disk.

    Raises:
        UserError: the phase before has no checkpoint, or the weights do not fit.
    """
    folder, geometry = run.phase_folder(phase), run.options.geometries[phase.index]
    t = prepare(run, build(run, phase), phase.first_step)
    if newest := run.newest(phase):
        saved = checkpoint.load(newest)
        if Geometry(**saved.state["geometry"]) != geometry:
            raise UserError(f"phase {phase.name} was begun on another grid of tokens: a phase added since changes it")
        _load(t, saved.model, saved.ema)
        optim.restore_moments(t.optimizer, saved.optimizer or {})
        t.step, t.train_seconds, t.skipped = (saved.state[key] for key in ("step", "train_seconds", "skipped"))
        note(f"{phase.name}: resumed from {newest}")
        return t
    if phase.index > 0:
        before = run.curriculum.phases[phase.index - 1]
        newest = run.newest(before)
        if newest is None or not run.phase_folder(before).is_done():
            raise UserError(f"phase {phase.name} cannot start: phase {before.name} is not done in {run.folder.path}")
        saved = checkpoint.load(newest)
        source = Geometry(**saved.state["geometry"])
        report = carry_over(t, saved.model, saved.ema, source, geometry)
        if run.options.optim.moments == "keep":
            optim.restore_moments(t.optimizer, saved.optimizer or {})
        t.train_seconds, t.skipped = saved.state["train_seconds"], saved.state["skipped"]
        _report(run, folder, report, str(newest), note)
    elif run.initial:
        report = carry_over(t, run.initial.state, None, run.initial.geometry, geometry)
        _report(run, folder, report, run.initial.origin, note)
    return t


def _load(t: Training, state: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None) -> None:
    t.objective.load_state_dict(state)
    if t.ema is not None:
        t.ema = {name: (ema or state)[name].to(value.device) for name, value in t.ema.items()}  # keeps the order


def carry_over(
    t: Training, state: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None, source: Geometry, target: Geometry
) -> TransferReport:
    """Load weights of another geometry, and their moving average (the weights themselves, where there was none)."""
    fresh = {name: value.clone() for name, value in t.objective.state_dict().items()}
    fitted, report = transfer(state, source, fresh, target)
    _load(t, fitted, transfer(ema, source, fresh, target)[0] if ema else None)
    return report


def _report(run: Run, folder: PhaseFolder, report: TransferReport, origin: str, note: Callable[[str], object]) -> None:
    if run.dist.is_main:
        for line in report.lines():
            note(line)
        write_json(folder.transfer, {"from": origin, **report.to_dict()})


def save(run: Run, phase: Phase, t: Training) -> None:
    """Keep the training as it stands (main process only)."""
    if not run.dist.is_main:
        return
    o, geometry = run.options, run.options.geometries[phase.index]
    state = {
        "step": t.step, "phase": phase.name, "train_seconds": t.train_seconds, "skipped": t.skipped,
        "geometry": geometry.to_dict(),
        "statistics": {g.digest(): asdict(run.statistics.of(g)) for g in (geometry, o.fine_geometry)},
        "classes": list(run.corpus.manifest.classes),
        "options": o.model_dump(mode="json", include={"audio", "model", "objective", "compression", "seed", "ema"}),
    }
    if run.initial and run.initial.source:  # whose weights these come from, and their licence
        state["source"] = dict(run.initial.source)
    tensors = {"model": t.objective.state_dict(), **({"ema": t.ema} if t.ema is not None else {})}
    folder = run.phase_folder(phase).checkpoints
    checkpoint.save(folder, t.step, tensors, state, optim.moments(t.optimizer), keep=o.train.keep)
