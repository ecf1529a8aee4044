"""Training state: model, optimiser and EMA of a phase; building, saving and loading them.

A phase starts from its own newest checkpoint, else from the last one of the phase before, else from the weights that
the run was given, else from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_c2f.core import checkpoint, distributed, draws
from ssl_c2f.core.files import one_line, write_json
from ssl_c2f.core.options import UserError
from ssl_c2f.core.run_folder import PhaseFolder, RunFolder
from ssl_c2f.core.signals import Stop
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.phases import Curriculum, Phase
from ssl_c2f.curriculum.transfer import TransferReport, transfer
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.runner import Runner
from ssl_c2f.data.statistics import InputStatistics
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.supervised import Supervised
from ssl_c2f.train import optim
from ssl_c2f.train.checkpoint_state import CheckpointState
from ssl_c2f.train.recipe import RunOptions
from ssl_c2f.train.weights import Weights


@dataclass(frozen=True)
class Run:
    """All that the phases of a run share."""

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

    def runner(self, geometry: Geometry, stop: Stop | None = None) -> Runner:
        """Reads windows in a geometry, on this process's device."""
        front_end = self.statistics.front_end(geometry).to(self.dist.device)
        return Runner(self.corpus, front_end, self.options.evaluation.batch_size, stop)


@dataclass
class Training:
    """The training state of a phase."""

    phase: Phase
    objective: Objective
    model: nn.Module  # the objective, wrapped for DDP and compilation
    optimizer: torch.optim.AdamW
    ema: dict[str, Tensor] | None
    step: int  # of the run, done so far
    train_seconds: float = 0.0
    skipped: int = 0
    first_loss: float | None = None  # of the phase
    unsound_since: int | None = None  # the step from which on its steps were skipped, if the last one was

    @property
    def highest_loss(self) -> float:
        """A loss above it has exploded: no objective here starts near 0 and rises to 10, and from where a network knows
        nothing none rises tenfold and comes back."""
        return 10 + 10 * abs(self.first_loss or 0.0)

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Whether a step may change the weights: its loss and gradients are finite, and the loss has not exploded."""
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = loss
        sound = math.isfinite(grad_norm) and math.isfinite(loss) and loss <= self.highest_loss
        self.skipped += not sound
        self.unsound_since = None if sound else self.step if self.unsound_since is None else self.unsound_since
        return sound


def diverged(run: Run, training: Training) -> UserError:
    """What to say of a run that has diverged. A checkpoint is sound if the step after it was: others are set aside."""
    phase, since = run.phase_folder(training.phase), training.unsound_since
    if run.dist.is_main and since is not None:
        for ruined in phase.since(since):
            checkpoint.set_aside(ruined, "diverged")
        write_json(run.folder.diverged, {"phase": training.phase.name, "step": since})
    before = reversed(run.curriculum.phases[: training.phase.index + 1])
    good = next(filter(None, (run.phase_folder(p).newest() for p in before)), None)
    goes_on = f"goes on from {good}" if good else "begins anew: there is no checkpoint of before"
    return UserError(
        f"{training.skipped} steps had a loss that is not finite or above {training.highest_loss:.4g} (ten times the "
        f"phase's first one, and 10), the last of them from step {since} on; with a lower learning rate (optim.lr or "
        f"phases.{training.phase.index}.lr) the same command {goes_on}"
    )


def build(run: Run, phase: Phase) -> Objective:
    """A phase's objective with fresh weights, the same in every process. The global generators are left alone."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(draws.seed(run.options.seed, phase.index, "weights"))
        return run.options.build(phase.geometry, run.corpus.num_classes)


def prepare(run: Run, phase: Phase) -> Training:
    """The beginning of a phase from scratch, on the device, with its optimiser and wrappers."""
    o, device = run.options, run.dist.device
    objective = build(run, phase)
    if isinstance(objective, Supervised):
        objective.count(run.corpus.manifest.labels(run.corpus.training))
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
    return Training(phase, objective, model, optimizer, ema, phase.first_step)


def start(run: Run, phase: Phase, note: Callable[[str], object]) -> Training:
    """The phase as it is on disk: resumed, or begun with the weights that come before it.

    Raises:
        UserError: the phase before has no checkpoint, or the weights do not fit.
    """
    training = prepare(run, phase)
    if newest := run.newest(phase):
        saved = checkpoint.load(newest)
        state = CheckpointState.read(saved.state, newest)
        # Adding a phase may change the grids of those before it, since all of them span the same padded clip.
        if state.geometry != phase.geometry:
            raise UserError(f"phase {phase.name} was begun on another grid of tokens: a phase added since changes it")
        _load(training, saved.model, saved.ema)
        optim.restore_state(training.optimizer, saved.optimizer or {})
        if saved.optimizer is None:
            raise UserError(f"{newest} has no optimizer.pt: training cannot go on from it")
        training.step, training.train_seconds, training.skipped = state.step, state.train_seconds, state.skipped
        training.first_loss = state.first_loss
        note(f"{phase.name}: resumed from {newest}")
    elif phase.index > 0:
        before = run.curriculum.phases[phase.index - 1]
        newest = run.newest(before)
        # Without the end of the phase before there is nothing to go on from: to start from its middle would be another
        # run, and to start afresh would waste what it costs.
        if newest is None or not run.phase_folder(before).is_done():
            raise UserError(f"phase {phase.name} cannot start: phase {before.name} is not done in {run.folder.path}")
        saved = checkpoint.load(newest)
        state = CheckpointState.read(saved.state, newest)
        report = carry_over(training, saved.model, saved.ema, state.geometry)
        if run.options.optim.moments == "keep":
            optim.restore_state(training.optimizer, saved.optimizer or {})
        training.train_seconds, training.skipped = state.train_seconds, state.skipped
        _report(run, phase, report, str(newest), note)
    elif run.initial:
        report = carry_over(training, run.initial.tensors, None, run.initial.geometry)
        _report(run, phase, report, run.initial.origin, note)
    return training


def _load(training: Training, state: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None) -> None:
    try:
        training.objective.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"phase {training.phase.name}: its checkpoint does not fit ({one_line(error)})") from None
    if training.ema is not None:  # in its own order, which the update relies on
        training.ema = {name: (ema or state)[name].to(value.device) for name, value in training.ema.items()}


def carry_over(
    training: Training, state: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None, source: Geometry
) -> TransferReport:
    """Load weights of another geometry, and their moving average (the weights themselves, where there was none)."""
    fresh = {name: value.clone() for name, value in training.objective.state_dict().items()}
    fitted, report = transfer(state, source, fresh, training.phase.geometry)
    _load(training, fitted, transfer(ema, source, fresh, training.phase.geometry)[0] if ema else None)
    return report


def _report(run: Run, phase: Phase, report: TransferReport, origin: str, note: Callable[[str], object]) -> None:
    if run.dist.is_main:
        for line in report.lines():
            note(line)
        write_json(run.phase_folder(phase).transfer, {"from": origin, **report.to_dict()})


def snapshot(run: Run, training: Training) -> Weights:
    """The weights as they stand, or their moving average where there is one, with all that is needed to use them."""
    phase, fine = training.phase, run.options.fine_geometry
    return Weights(
        recipe=run.options, geometry=phase.geometry, classes=run.corpus.manifest.classes,
        statistics={geometry.digest(): run.statistics.of(geometry) for geometry in (phase.geometry, fine)},
        source=run.initial.source if run.initial else {},  # whose weights these come from, and their licence
        step=training.step, phase=phase.name, train_seconds=training.train_seconds, skipped=training.skipped,
        first_loss=training.first_loss,
        tensors=training.objective.state_dict() if training.ema is None else training.ema,
        origin=str(run.phase_folder(phase).path),
    )


def save(run: Run, training: Training) -> bool:
    """Keep the training as it stands (main process only), unless it is about to diverge; whether it was kept."""
    if not run.dist.is_main or training.unsound_since is not None:
        return False
    tensors = {"model": training.objective.state_dict()} | ({"ema": training.ema} if training.ema is not None else {})
    checkpoint.save(
        run.phase_folder(training.phase).checkpoints, training.step, tensors, snapshot(run, training).to_json(),
        optim.optimizer_state(training.optimizer), keep=run.options.train.keep,
    )
    return True
